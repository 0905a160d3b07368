"""What a simulated cluster must answer and hold, from tokens alone. Knows nothing of how it came about."""

from collections.abc import Iterator, Mapping, Sequence

from support.sim_nodes import MODEL
from support.sim_plan import Plan, Wanted

from engines.sim.arithmetic import Arithmetic
from engines.sim.reference import expected_tokens
from engines.sim.runner import sim_spec
from kvcore.chunk_keys import chunk_keys, root_key
from nodeapi.messages import GenerateRequest


class Oracle:
    """`legs`: every decode leg that was sent, by its id; it may grow."""

    def __init__(self, plan: Plan, legs: Mapping[str, GenerateRequest]) -> None:
        self._plan = plan
        self._legs = legs
        self._expected: dict[str, list[list[int]]] = {}
        self.reseeded = 0

    def expected(self, wanted: Wanted) -> list[list[int]]:
        """Tokens of each completion, where nothing fails."""
        if wanted.id not in self._expected:
            self._expected[wanted.id] = expected_tokens(self._plan.engine, wanted.prompt, wanted.sampling)
        return self._expected[wanted.id]

    def accepts(self, wanted: Wanted, index: int, tokens: list[int], *, whole: bool) -> bool:
        """Whether a completion may have these tokens (not `whole`: begin with them): those expected, or, where several
        completions of one request had to go on alone after a failure, those that a seed of its own gives."""
        expected = self.expected(wanted)[index]
        if tokens == (expected if whole else expected[: len(tokens)]):
            return True
        for name, leg in self._legs.items():
            done = leg.output_token_ids
            if name.startswith(f"{wanted.id}.d") and leg.sampling.n < wanted.sampling.n and done == tokens[: len(done)]:
                (other,) = expected_tokens(self._plan.engine, wanted.prompt, leg.sampling, output=done)
                if done == expected[: len(done)] and tokens == (other if whole else other[: len(tokens)]):
                    self.reseeded += 1
                    return True
        return False

    def chunks(self, requests: Sequence[Wanted]) -> dict[bytes, bytes]:
        """What each chunk must hold, from tokens alone."""
        engine, size = self._plan.engine, self._plan.chunk_tokens
        arithmetic = Arithmetic(engine.weights_version, engine.bytes_per_token, engine.vocab_size)
        root = root_key(sim_spec(engine, MODEL, size).fingerprint, b"")
        known: dict[bytes, bytes] = {}
        for tokens in self._token_lists(requests):
            record, records = b"", []
            for at, token in enumerate(tokens):
                record = arithmetic.record(record, token, at)
                records.append(record)
            for chunk, key in enumerate(chunk_keys(root, tokens, size)):
                known[key] = b"".join(records[chunk * size : (chunk + 1) * size])
        return known

    def _token_lists(self, requests: Sequence[Wanted]) -> Iterator[list[int]]:
        for wanted in requests:
            for tokens in self.expected(wanted):
                yield [*wanted.prompt, *tokens]
        for leg in self._legs.values():
            if leg.sampling.n == 1:  # a completion that went on alone may have had a seed of its own
                (tokens,) = expected_tokens(
                    self._plan.engine, leg.prompt_token_ids, leg.sampling, output=leg.output_token_ids
                )
                yield [*leg.prompt_token_ids, *tokens]
