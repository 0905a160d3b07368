"""Requests of a simulated cluster that name documents: plans of them, and the answers and chunks that they may come to.

Which documents are reused approximately depends on what was there in time. An answer is right if some choice of them
explains it, anew from each token on at which another leg took over.
"""

import itertools
import random
from collections.abc import Iterator, Sequence

from support.sim_plan import BLOCK, CHUNK, FIRST_S, Fault, Plan, Wanted

from engines.sim import reference
from engines.sim.arithmetic import Arithmetic
from kvcore.chunk_keys import split_adapter
from kvcore.config.schema import SimEngineConfig, StoreConfig
from kvcore.documents.keys import keys_of_documents
from kvcore.types import ChunkKey
from nodeapi.sampling import SamplingParams
from router.documents.named import NamedDocuments

K = 4


def documents_plan(
    seed: int,
    *,
    requests: int = 24,
    texts: int = 8,
    apart_s: float = 0.2,
    faults: bool = False,
    segment_bytes: int = 4096 * 120,
    plain: float = 0.25,
    why: str = "",
) -> Plan:
    """Prompts of one header with documents in any order, and some (`plain`) without any. `apart_s`: between two of
    them. `faults`: engines of decoders die in the middle of answers. `why`: the gate is shut, for this reason."""
    dice = random.Random(f"documents {seed}")
    header = [dice.randrange(1, 300) for _ in range(2 * CHUNK + 5)]
    known = [[dice.randrange(1, 300) for _ in range(dice.randrange(20, 75))] for _ in range(texts)]
    wanted = [
        _request(dice, f"r{number}", FIRST_S + apart_s * number, header, known if dice.random() >= plain else [], why)
        for number in range(requests)
    ]
    planned = list[Fault]()
    if faults:
        for one in dice.sample(wanted, requests // 4):
            at_s, node = one.at_s + 0.1 + 0.3 * dice.random(), (dice.choice(["d1", "d2"]),)
            planned += [Fault(at_s, "kill_engine", node), Fault(at_s + 0.4, "start_engine", node)]
    return Plan(
        engine=SimEngineConfig(
            block_size=BLOCK,
            num_blocks=2000,
            bytes_per_token=16,
            max_context=512,
            vocab_size=300,
            prefill_tokens_per_s=2000.0,
            inter_token_s=0.01,
            max_batch_tokens=128,
            max_sequences=16,
        ),
        store=StoreConfig(reserve_ttl_s=2.0, read_lease_s=3.0, retire_grace_s=0.5),
        segment_bytes=segment_bytes,
        requests=wanted,
        faults=sorted(planned, key=lambda fault: fault.at_s),
        weather=0.3,
    )


def _request(  # noqa: PLR0917 - one call
    dice: random.Random, name: str, at_s: float, header: list[int], texts: Sequence[list[int]], why: str
) -> Wanted:
    prompt, spans = list(header), list[tuple[int, int]]()
    for text in dice.sample(texts, min(len(texts), dice.randrange(2, 5))):
        spans.append((len(prompt), len(prompt) + len(text)))
        prompt += [*text, 7, 7]
    prompt += [dice.randrange(1, 300) for _ in range(dice.randrange(10, 60))]
    sampling = SamplingParams(temperature=dice.choice([0.0, 1.0]), seed=dice.randrange(1 << 40), max_tokens=30)
    named = NamedDocuments("field", len(header), tuple(spans), k=K, why=why) if spans else None
    return Wanted(name, at_s, prompt, sampling, None, documents=named)


def explains(engine: SimEngineConfig, wanted: Wanted, tokens: list[int], begins: Sequence[int], *, whole: bool) -> bool:
    """Whether some choice of documents gives these tokens. `begins`: how many tokens had come when each leg began."""

    def reached(done: int) -> bool:
        for reused in _choices(engine, wanted):
            given = _completion(engine, wanted, tokens[:done], reused)
            common = next((at for at, pair in enumerate(zip(given, tokens, strict=False)) if pair[0] != pair[1]), None)
            common = min(len(given), len(tokens)) if common is None else common
            if common == len(tokens) and (not whole or len(given) == len(tokens)):
                return True
            if any(done < begin <= common and reached(begin) for begin in begins):
                return True
        return False

    return reached(0)


def chunks_of_documents(
    engine: SimEngineConfig, fingerprint: bytes, wanted: Wanted, chunk_tokens: int
) -> Iterator[tuple[ChunkKey, bytes]]:
    """What each chunk of the documents holds, the last ones with zeros behind."""
    named, arithmetic = wanted.documents, _arithmetic(engine, wanted)
    if named is None:
        return
    of_each = keys_of_documents(
        fingerprint, wanted.salt, wanted.prompt, named.header, named.spans, chunk_tokens=chunk_tokens
    )
    for (start, stop), keys in zip(named.spans, of_each, strict=True):
        record, records = b"", []
        for at, token in enumerate([*wanted.prompt[: named.header], *wanted.prompt[start:stop]]):
            record = arithmetic.record(record, token, at)
            records.append(record)
        own = records[named.header :]
        for number, key in enumerate(keys):
            whole = b"".join(own[number * chunk_tokens : (number + 1) * chunk_tokens])
            yield key, whole.ljust(chunk_tokens * engine.bytes_per_token, b"\0")


def _choices(engine: SimEngineConfig, wanted: Wanted) -> Iterator[dict[int, bytes]]:
    """The records of approximate tokens, by position: of each choice of documents, behind a prefix of any length."""
    named, arithmetic = wanted.documents, _arithmetic(engine, wanted)
    assert named is not None and named.told is not None
    each = []
    for span in named.spans:
        alone = NamedDocuments("field", named.header, (span,), k=named.k).told
        assert alone is not None
        each.append(reference._reused(arithmetic, wanted.prompt, alone))
    seen = set[frozenset[int]]()
    for prefix in range(0, len(wanted.prompt), CHUNK):
        for chosen in itertools.product([True, False], repeat=len(each)):
            reused = {
                at: record for one in itertools.compress(each, chosen) for at, record in one.items() if at >= prefix
            }
            if frozenset(reused) not in seen:
                seen.add(frozenset(reused))
                yield reused


def _completion(engine: SimEngineConfig, wanted: Wanted, done: list[int], reused: dict[int, bytes]) -> list[int]:
    return reference._completion(
        _arithmetic(engine, wanted),
        [*wanted.prompt, *done],
        len(wanted.prompt),
        wanted.sampling,
        0,
        engine.max_context,
        reused,
    )


def _arithmetic(engine: SimEngineConfig, wanted: Wanted) -> Arithmetic:
    adapter, _ = split_adapter(wanted.salt)
    return Arithmetic(engine.weights_version, engine.bytes_per_token, engine.vocab_size, adapter)
