"""What a simulated cluster must answer and hold, from tokens alone. Knows nothing of how it came about."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from msgspec.structs import replace
from support.sim_documents import chunks_of_documents, explains
from support.sim_nodes import MODEL
from support.sim_plan import Plan, Wanted

from engines.sim.arithmetic import Arithmetic
from engines.sim.reference import expected_tokens
from engines.sim.runner import sim_spec
from kvcore.chunk_keys import chunk_keys, root_key, split_adapter
from kvcore.config.schema import SimEngineConfig
from nodeapi.messages import GenerateRequest


class Oracle:
    """`legs`: every decode leg that was sent, by its id; it may grow. `revisions`: of the weights that nodes may have;
    empty: one."""

    def __init__(self, plan: Plan, legs: Mapping[str, GenerateRequest], revisions: Sequence[str] = ()) -> None:
        self._legs = legs
        self._chunk_tokens = plan.chunk_tokens
        self._engines = [replace(plan.engine, weights_version=name) for name in revisions] or [plan.engine]
        self._expected: dict[tuple[str, str], list[list[int]]] = {}
        self.reseeded = 0
        self.revisions: Counter[str] = Counter()
        """How many answers with tokens were of each."""

    def expected(self, wanted: Wanted, engine: SimEngineConfig) -> list[list[int]]:
        """Tokens of each completion, where nothing fails."""
        name = wanted.id, engine.weights_version
        if name not in self._expected:
            adapter, _ = split_adapter(wanted.salt)
            self._expected[name] = expected_tokens(engine, wanted.prompt, wanted.sampling, adapter=adapter)
        return self._expected[name]

    def wrong(self, wanted: Wanted, outputs: list[list[int]], *, whole: bool) -> list[str]:
        """What is wrong with an answer (not `whole`: with its beginning). All of it must be of one revision."""
        found = []
        for engine in self._engines:
            bad = [at for at, tokens in enumerate(outputs) if not self._accepts(engine, wanted, at, tokens, whole)]
            if not bad:
                self.revisions[engine.weights_version] += any(outputs)
                return []
            found += [f"{wanted.id}[{at}]: {outputs[at]}, not {self.expected(wanted, engine)[at]}" for at in bad]
        return found

    def _accepts(self, engine: SimEngineConfig, wanted: Wanted, index: int, tokens: list[int], whole: bool) -> bool:
        """Whether a completion may have these tokens: those expected, or, where several completions of one request had
        to go on alone after a failure, those that a seed of its own gives."""
        expected = self.expected(wanted, engine)[index]
        if tokens == (expected if whole else expected[: len(tokens)]):
            return True
        if wanted.documents is not None and not wanted.documents.why:
            begins = [
                len(leg.output_token_ids) for name, leg in self._legs.items() if name.startswith(f"{wanted.id}.d")
            ]
            return explains(engine, wanted, tokens, begins, whole=whole)
        for name, leg in self._legs.items():
            done = leg.output_token_ids
            if name.startswith(f"{wanted.id}.d") and leg.sampling.n < wanted.sampling.n and done == tokens[: len(done)]:
                (other,) = _continued(engine, leg)
                if done == expected[: len(done)] and tokens == (other if whole else other[: len(tokens)]):
                    self.reseeded += 1
                    return True
        return False

    def chunks(self, requests: Sequence[Wanted]) -> dict[bytes, bytes]:
        """What each chunk must hold, from tokens alone."""
        known: dict[bytes, bytes] = {}
        for engine in self._engines:
            self._add_chunks(known, engine, requests)
        return known

    def _add_chunks(self, known: dict[bytes, bytes], engine: SimEngineConfig, requests: Sequence[Wanted]) -> None:
        size = self._chunk_tokens
        fingerprint = sim_spec(engine, MODEL, size).fingerprint
        for wanted in requests:
            known.update(chunks_of_documents(engine, fingerprint, wanted, size))
        for salt, tokens in self._token_lists(engine, requests):
            adapter, _ = split_adapter(salt)
            arithmetic = Arithmetic(engine.weights_version, engine.bytes_per_token, engine.vocab_size, adapter)
            record, records = b"", []
            for at, token in enumerate(tokens):
                record = arithmetic.record(record, token, at)
                records.append(record)
            for chunk, key in enumerate(chunk_keys(root_key(fingerprint, salt), tokens, size)):
                known[key] = b"".join(records[chunk * size : (chunk + 1) * size])

    def _token_lists(self, engine: SimEngineConfig, requests: Sequence[Wanted]) -> Iterator[tuple[bytes, list[int]]]:
        for wanted in requests:
            for tokens in self.expected(wanted, engine):
                yield wanted.salt, [*wanted.prompt, *tokens]
        for leg in self._legs.values():
            if leg.sampling.n == 1:  # a completion that went on alone may have had a seed of its own
                (tokens,) = _continued(engine, leg)
                yield leg.cache_salt, [*leg.prompt_token_ids, *tokens]


def _continued(engine: SimEngineConfig, leg: GenerateRequest) -> list[list[int]]:
    """What a leg answers, what came before it included."""
    adapter, _ = split_adapter(leg.cache_salt)
    return expected_tokens(engine, leg.prompt_token_ids, leg.sampling, output=leg.output_token_ids, adapter=adapter)
