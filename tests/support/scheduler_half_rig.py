"""The scheduler half with its calls at hand, in the order in which vLLM makes them. Chunks of 8 tokens, blocks of 4."""

from collections.abc import Iterable, Sequence

from support.vllm_worker_model import FakeLookup

from engines.vllm.connector.orders import LegParams, LoadOrder, StepOrders
from engines.vllm.connector.scheduler_half import SchedulerHalf
from engines.vllm.connector.scheduler_requests import RequestView, ScheduledRequest
from kvcore.chunk_keys import KeyChain, chunk_keys, root_key
from kvcore.clock import ManualClock
from kvcore.types import ChunkKey

CHUNK, BLOCK = 8, 4
BLOCKS = tuple(range(100, 150))
NEW = bytes(15) + b"n"


def root_of(salt: bytes) -> ChunkKey:
    return root_key(bytes(16), salt)


def keys_of(tokens: Sequence[int], salt: bytes = b"") -> list[ChunkKey]:
    return chunk_keys(root_of(salt), tokens, CHUNK)


class Rig:
    def __init__(
        self,
        *,
        stored: Iterable[ChunkKey] = (),
        save_output: bool = True,
        delay: int = 0,
        share_loads: bool = True,
    ) -> None:
        self.lookup = FakeLookup(set(stored), lambda: delay)
        self.identity = bytes(16)
        self.clock = ManualClock()
        self.half = SchedulerHalf(
            chain_of=lambda salt: KeyChain.of(self.identity, salt),
            chunk_tokens=CHUNK,
            block_size=BLOCK,
            save_output=save_output,
            lookup=self.lookup,
            clock=self.clock,
            share_loads=share_loads,
        )

    def arrive(
        self,
        num_tokens: int,
        *,
        name: str = "r",
        params: LegParams | None = None,
        salt: bytes = b"",
        cacheable: bool = True,
    ) -> list[int]:
        tokens = list(range(num_tokens))
        self.half.arrived(
            RequestView(
                request_id=name,
                token_ids=tokens,
                num_prompt_tokens=num_tokens,
                params=params,
                salt=salt,
                cacheable=cacheable,
            )
        )
        return tokens

    def load(self, num_local: int = 0, *, name: str = "r") -> LoadOrder:
        """Up to the LoadOrder."""
        count, _ = self.half.matched(name, num_local)
        assert count is not None
        self.half.allocated(name, BLOCKS[: -(-(num_local + count) // BLOCK)], count)
        (order,) = self.half.build([], []).loads
        return order

    def run(
        self, first: int, count: int, *, name: str = "r", admit: bool = False, preempted: Sequence[str] = ()
    ) -> StepOrders:
        """One step of this request; `admit`: its first one."""
        if admit:
            self.half.allocated(name, BLOCKS, 0)
        return self.half.build([ScheduledRequest(name, first, count, BLOCKS)], list(preempted))

    def reset(self) -> None:
        """With another identity from now on: `NEW`."""
        self.identity = NEW
        self.half.reset()

    def is_empty(self) -> bool:
        return not (self.half._requests or self.half._loads or self.lookup.questions)


def decode(chunks: int, *, tail: bool = False) -> LegParams:
    return LegParams(leg="leg", handoff_chunks=chunks, wait_until=9.5, tail=tail)
