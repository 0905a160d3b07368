"""What `vllm_scheduler_model` schedules: requests, steps in flight, and the pool of blocks with its prefix cache."""

from collections import deque
from dataclasses import dataclass, field

from engines.vllm.connector.orders import LegParams, StepOrders


@dataclass(eq=False)
class Request:
    request_id: str
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    salt: str
    params: LegParams | None = None
    cacheable: bool = True
    skip_reading: bool = False
    status: str = "waiting"
    num_computed: int = 0
    num_placeholders: int = 0
    num_in_flight: int = 0
    num_stale: int = 0
    drop_stale: bool = False
    last_seq: int = 0
    blocks: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.tokens) - self.num_prompt >= self.max_tokens


@dataclass
class Step:
    orders: StepOrders
    work: dict[Request, tuple[int, int, int, list[int]]]
    """Request -> first position, number of tokens, of them drafts, block table."""
    finished: set[str]
    seq: int


class BlockPool:
    """Reference counts, and full blocks that can be found again by the tokens that they stand for."""

    def __init__(self, num_blocks: int):
        self.refs = [0] * num_blocks
        self.free = deque(range(1, num_blocks))
        self.refs[0] = 1  # vLLM's null block
        self.by_prefix: dict[tuple[str, tuple[int, ...]], int] = {}
        self.prefix_of: dict[int, tuple[str, tuple[int, ...]]] = {}

    def allocate(self, count: int) -> list[int]:
        blocks = [self.free.popleft() for _ in range(count)]
        for block in blocks:
            self.refs[block] = 1
            if (prefix := self.prefix_of.pop(block, None)) is not None:
                del self.by_prefix[prefix]
        return blocks

    def touch(self, blocks: list[int]) -> None:
        for block in blocks:
            if self.refs[block] == 0:
                self.free.remove(block)
            self.refs[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.refs[block] -= 1
            assert self.refs[block] >= 0, "freed twice"
            if self.refs[block] == 0:
                self.free.append(block)

    def cache(self, prefix: tuple[str, tuple[int, ...]], block: int) -> None:
        if prefix not in self.by_prefix and block not in self.prefix_of:
            self.by_prefix[prefix] = block
            self.prefix_of[block] = prefix

    def reset(self) -> None:
        self.by_prefix.clear()
        self.prefix_of.clear()
