"""Documents reused wherever they stand in a prompt: what each way to do it costs, and how far its answers move.

Three documents of 300 tokens, each computed apart, joined behind a header, a question behind them. Full computation is
the judge: divergence (KL, nats) of the first token and of 12 tokens led along the full one's, the share of them that
are the same, answers found where they are known, and the processor's time for the first token. All ways run on one
plain forward pass (`benchmarks.blend_reference`) by turns, so their times compare; CacheBlend is a reference
implementation there. Then the product's own engine, first-k behind the header: time to the first token in full over
that with reuse, at 900 and 3,000. Wanted: first-k 8 behind the header within 0.02 of CacheBlend 15 %'s agreement at a
third of its time; first token 6 times sooner at 900 tokens, 10 times at 3,000.
Run: python -m benchmarks.blend [--samples 100] [--model FOLDER ...]; `benchmarks.blend_samples` says what it needs
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
from tokenizers import Tokenizer

from benchmarks.blend_reference import Layers, Reference
from benchmarks.blend_samples import SOURCES, Sample, Samples
from benchmarks.engine import MODEL
from engines.paged.loop import EngineLoop
from engines.paged.options import EngineOptions
from engines.torch.model import load_model
from engines.torch.runner import TorchRunner
from engines.torch.spec import build_kv_spec
from kvcore.clock import SystemClock
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from nodeapi.documents import CompareReply, CompareRequest, Documents

Run = Callable[[], tuple[Layers, torch.Tensor]]
"""Gives the KV of all tokens, and log-probabilities behind the last one."""
STEPS = 12
BLOCK, CHUNK = 16, 64
FAQ = SOURCES.index("faq")
FULL, FIRST_K, BLEND = "full", "behind the header, first 8", "CacheBlend 15 %"
SPEED = ((3, 300), (10, 300))
"""Documents and tokens of each, of the prompts whose first token is timed: about 900 and 3,000 tokens."""


@dataclass(frozen=True)
class Outcome:
    """Of one way on one sample."""

    way: str
    source: str
    cpu_s: float
    share: float
    """Of the full computation's time."""
    kl: float
    first_same: float
    kl_all: float
    same: float
    fact: float | None
    """1: the answer has it. None: nobody knows a right one."""


class Ways:
    """The ways to compute one sample's first token, each with the KV of its documents at hand."""

    def __init__(self, model: Reference, sample: Sample) -> None:
        self._model, self._sample = model, sample
        self._ids = sample.prompt
        self._context = len(self._ids) - len(sample.tail)
        header = len(sample.header)
        self._header = model.prefill(sample.header)[0]
        self._alone = [model.prefill(document)[0] for document in sample.documents]
        both = [model.prefill(sample.header + document)[0] for document in sample.documents]
        self._behind = [[(k[header:], v[header:]) for k, v in kv] for kv in both]

    def each(self) -> Iterator[tuple[str, Run]]:
        """Their names, and what computes each. Putting cached KV together and turning it is part of a way's time."""
        yield "joined, keys not turned", partial(self._reused, self._alone, None, 0)
        for k in (0, 8, 16, 32):
            yield f"turned, first {k}", partial(self._reused, self._alone, 0, k)
        behind = len(self._sample.header)
        for k in (0, 8, 16, 32):
            yield f"behind the header, first {k}", partial(self._reused, self._behind, behind, k)
        yield BLEND, lambda: self._model.blend(self._ids, self._joined(self._alone, 0), 0.15, self._context)

    def _joined(self, cached: list[Layers], computed_at: int | None) -> Layers:
        """KV of the whole prompt, with room for the tail. `computed_at`: where documents began; None: not turned."""
        out = []
        for layer, (header_k, header_v) in enumerate(self._header):
            keys, values = [header_k], [header_v]
            for kv, (start, _) in zip(cached, self._sample.spans, strict=True):
                k, v = kv[layer]
                keys.append(k if computed_at is None else self._model.turned(k, start - computed_at))
                values.append(v)
            room = torch.zeros(len(self._sample.tail), *header_k.shape[1:])
            out.append((torch.cat([*keys, room]), torch.cat([*values, room])))
        return out

    def _reused(self, cached: list[Layers], computed_at: int | None, k: int) -> tuple[Layers, torch.Tensor]:
        firsts = [torch.arange(start, start + k) for start, _ in self._sample.spans]
        rows = torch.cat([*firsts, torch.arange(self._context, len(self._ids))])
        return self._model.patch(self._ids, self._joined(cached, computed_at), rows)


def judged(model: Reference, tokenizer: Tokenizer, sample: Sample) -> Iterator[Outcome]:
    """Every way on one sample."""
    done = [(FULL, *timed(lambda: model.prefill(sample.prompt)))]
    done += [(way, *timed(run)) for way, run in Ways(model, sample).each()]
    _, full_s, (kv, said) = done[0]
    answer = model.greedy(kv, said, STEPS)
    firsts = torch.stack([said for _, _, (_, said) in done])
    said_by = torch.cat((firsts[:, None], model.follow([kv for _, _, (kv, _) in done], answer)[:, :-1]), 1)
    behind = said_by[0]

    def outcome(way: str, cpu_s: float, rows: torch.Tensor) -> Outcome:
        kl = (behind.exp() * (behind - rows)).sum(-1)
        picked = rows.argmax(-1)
        same = (picked == behind.argmax(-1)).float()
        text = tokenizer.decode(picked.tolist())
        return Outcome(
            way=way,
            source=sample.source,
            cpu_s=cpu_s,
            share=cpu_s / full_s,
            kl=float(kl[0]),
            first_same=float(same[0]),
            kl_all=float(kl.mean()),
            same=float(same.mean()),
            fact=float(sample.fact in text) if sample.fact else None,
        )

    for (way, cpu_s, _), rows in zip(done, said_by, strict=True):
        yield outcome(way, cpu_s, rows)


def timed(run: Run) -> tuple[float, tuple[Layers, torch.Tensor]]:
    """Seconds of the processor, and what came of it."""
    began = time.process_time()
    out = run()
    return time.process_time() - began, out


def some(folder: str, tokens: int, numbers: list[int]) -> list[Outcome]:
    """What a worker process does: these samples, on one thread. `tokens`: of each document."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    samples, model = Samples(lambda text: list(tokenizer.encode(text).ids)), Reference(Path(folder))
    return [outcome for number in numbers for outcome in judged(model, tokenizer, samples.one(number, tokens))]


def row(model: str, source: str, outcomes: list[Outcome]) -> dict[str, object]:
    """Means of one way, and its time by the median."""
    facts = [outcome.fact for outcome in outcomes if outcome.fact is not None]
    return {
        "model": model,
        "source": source,
        "way": outcomes[0].way,
        "samples": len(outcomes),
        "cpu_ms": round(statistics.median(outcome.cpu_s for outcome in outcomes) * 1e3, 1),
        "share": round(statistics.median(outcome.share for outcome in outcomes), 4),
        "kl_first": round(statistics.mean(outcome.kl for outcome in outcomes), 4),
        "kl_first_max": round(max(outcome.kl for outcome in outcomes), 3),
        "first_same": round(statistics.mean(outcome.first_same for outcome in outcomes), 3),
        "kl": round(statistics.mean(outcome.kl_all for outcome in outcomes), 4),
        "agreement": round(statistics.mean(outcome.same for outcome in outcomes), 3),
        "facts": f"{sum(facts):g}/{len(facts)}" if facts else "",
    }


def rows_of(model: str, outcomes: list[Outcome]) -> list[dict[str, object]]:
    """A row a way: of all samples, then of each source."""
    order = list(dict.fromkeys(outcome.way for outcome in outcomes))
    by_way = sorted(outcomes, key=lambda outcome: order.index(outcome.way))
    rows = [row(model, "all", list(group)) for _, group in groupby(by_way, lambda outcome: outcome.way)]
    for source in SOURCES:
        part = [outcome for outcome in by_way if outcome.source == source]
        rows += [row(model, source, list(group)) for _, group in groupby(part, lambda outcome: outcome.way)]
    return rows


async def speed(folder: str, rounds: int) -> list[dict[str, object]]:
    """The product's engine: first token in full over that with documents in the store's stead at hand."""
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    samples = Samples(lambda text: list(tokenizer.encode(text).ids))
    loaded = load_model(ModelConfig(path=folder, name="m", dtype="float32"), TorchEngineConfig(block_size=BLOCK))
    runner = TorchRunner(loaded, build_kv_spec(loaded, "m", CHUNK), num_blocks=1200, threads=1)
    options = EngineOptions(max_batch_tokens=512, max_sequences=8, max_waiting=64)
    rows: list[dict[str, object]] = []
    async with EngineLoop(runner, None, options, SystemClock()) as engine:
        for count, tokens in SPEED:
            replies = [
                await compared(engine, samples.one(FAQ + len(SOURCES) * at, tokens, count)) for at in range(rounds + 1)
            ][1:]
            rows.append(
                {
                    "tokens": count * tokens,
                    "full_s": round(statistics.median(reply.full_s for reply in replies), 3),
                    "reused_s": round(statistics.median(reply.reused_s for reply in replies), 3),
                    "times": round(statistics.median(reply.full_s / reply.reused_s for reply in replies), 1),
                    "agreement": round(statistics.mean(reply.agreement for reply in replies), 3),
                }
            )
    return rows


async def compared(engine: EngineLoop, sample: Sample) -> CompareReply:
    """The sample in full and reused. Its documents are computed apart first, which `reused_s` does not have in it."""
    return await engine.compare(
        CompareRequest(
            request_id=f"{sample.source}-{len(sample.prompt)}",
            prompt_token_ids=sample.prompt,
            documents=Documents(header=len(sample.header), spans=sample.spans),
            num_tokens=STEPS,
            deadline_s=600.0,
        )
    )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", metavar="FOLDER", help=f"more than one may be given ({MODEL})")
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=300, help="of each of the three documents")
    parser.add_argument("--rounds", type=int, default=5, help="of the product's engine, at each length; 0: none")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args()
    rows, speeds = [], {}
    for given in options.model or [MODEL]:
        folder = str(Path(given).expanduser())
        name = Path(folder).name
        parts = [list(range(first, options.samples, options.workers)) for first in range(options.workers)]
        with ProcessPoolExecutor(options.workers) as workers:
            done = list(workers.map(some, [folder] * len(parts), [options.tokens] * len(parts), parts))
        rows += rows_of(name, [outcome for part in done for outcome in part])
        speeds[name] = asyncio.run(speed(folder, options.rounds)) if options.rounds else []
    columns = ("model", "source", "way", "cpu_ms", "share", "kl_first", "first_same", "kl", "agreement", "facts")
    print("\t".join(columns))
    for line in rows:
        print("\t".join(str(line[column]) for column in columns))
    for name, lines in speeds.items():
        for fast in lines:
            print(f"{name}\t" + "\t".join(f"{key} {value}" for key, value in fast.items()))
    print(f"RESULT {json.dumps({'rows': rows, 'speed': speeds})}")


if __name__ == "__main__":
    main()
