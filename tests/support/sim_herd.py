"""Plans of a herd: many requests at once for one prompt, or for one long prefix; the computing node may be killed."""

import random
from dataclasses import dataclass

from support.sim_plan import BLOCK, CHUNK, FIRST_S, Fault, Plan, Wanted

from kvcore.config.schema import SimEngineConfig, StoreConfig
from nodeapi.sampling import SamplingParams
from router.documents.named import NamedDocuments

K, DOCUMENT = 4, 5 * CHUNK + 3
"""Tokens of a document: those that are computed where it stands, and all."""
RATE = 500.0
"""Prompt tokens that an engine computes in a second."""
COMPUTE_S = 16 * CHUNK / RATE
"""For the prefix, alone."""


@dataclass(frozen=True)
class Herd:
    """`count` requests within `spread_s` whose prompts begin with the same `prefix_tokens` and go on with `own_tokens`
    of their own."""

    nodes: tuple[str, ...] = ("p1", "p2", "d1", "d2")
    count: int = 8
    prefix_tokens: int = 16 * CHUNK + 1
    own_tokens: int = 0
    spread_s: float = 0.0
    kill_s: float | None = None
    """So long after the first request the node that computes is killed."""
    kills: str = "node"
    """Or `engine`."""
    documents: int = 0
    """Each prompt names so many after its prefix, the same ones in another order."""

    def plan(self, seed: int) -> Plan:
        """Of this seed."""
        dice = random.Random(seed)
        prefix = [dice.randrange(1, 300) for _ in range(self.prefix_tokens)]
        texts = [[dice.randrange(1, 300) for _ in range(DOCUMENT)] for _ in range(self.documents)]
        requests = [self._request(dice, number, prefix, texts) for number in range(self.count)]
        return Plan(
            engine=SimEngineConfig(
                block_size=BLOCK,
                num_blocks=2048,
                bytes_per_token=16,
                max_context=1024,
                vocab_size=300,
                prefill_tokens_per_s=RATE,
                inter_token_s=0.005,
                max_batch_tokens=4 * CHUNK,
            ),
            store=StoreConfig(retire_grace_s=0.5),
            segment_bytes=4096 * 200,
            requests=requests,
            faults=[] if self.kill_s is None else [Fault(FIRST_S + self.kill_s, "kill_computing", (self.kills,))],
            weather=1.0,
            nodes=self.nodes,
        )

    def _request(self, dice: random.Random, number: int, prefix: list[int], texts: list[list[int]]) -> Wanted:
        at_s, prompt, spans = FIRST_S + dice.random() * self.spread_s, list(prefix), list[tuple[int, int]]()
        for text in dice.sample(texts, len(texts)):
            prompt.append(7)
            spans.append((len(prompt), len(prompt) + len(text)))
            prompt += text
        prompt += [dice.randrange(1, 300) for _ in range(self.own_tokens)]
        sampling = SamplingParams(temperature=1.0, seed=number, max_tokens=4, ignore_eos=True)
        named = NamedDocuments("field", len(prefix), tuple(spans), k=K) if spans else None
        return Wanted(f"r{number}", at_s, prompt, sampling, None, documents=named)
