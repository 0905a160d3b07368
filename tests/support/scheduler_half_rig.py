"""The scheduler half with its calls at hand, in the order in which vLLM makes them. Chunks of 8 tokens, blocks of 4."""

from support.vllm_worker_model import FakeLookup

from engines.vllm.connector.orders import LegParams
from engines.vllm.connector.scheduler_half import SchedulerHalf
from engines.vllm.connector.scheduler_requests import RequestView, ScheduledRequest
from kvcore.chunk_keys import chunk_keys, root_key

CHUNK, BLOCK = 8, 4
BLOCKS = tuple(range(100, 150))


def root_of(salt):
    return root_key(bytes(16), salt)


def keys_of(tokens, salt=b""):
    return chunk_keys(root_of(salt), tokens, CHUNK)


class Rig:
    def __init__(self, *, stored=(), save_output=True, delay=0):
        self.lookup = FakeLookup(set(stored), lambda: delay)
        self.half = SchedulerHalf(
            root_of=root_of, chunk_tokens=CHUNK, block_size=BLOCK, save_output=save_output, lookup=self.lookup
        )

    def arrive(self, num_tokens, *, name="r", params=None, salt=b"", cacheable=True):
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

    def load(self, num_local=0, *, name="r"):
        """Up to the LoadOrder."""
        count, _ = self.half.matched(name, num_local)
        self.half.allocated(name, BLOCKS[: -(-(num_local + count) // BLOCK)], count)
        (order,) = self.half.build([], []).loads
        return order

    def run(self, first, count, *, name="r", admit=False, preempted=()):
        """One step of this request; `admit`: its first one."""
        if admit:
            self.half.allocated(name, BLOCKS, 0)
        return self.half.build([ScheduledRequest(name, first, count, BLOCKS)], list(preempted))

    def is_empty(self):
        return not (self.half._requests or self.half._loads or self.lookup.questions)


def decode(chunks, *, tail=False):
    return LegParams(leg="leg", handoff_chunks=chunks, wait_until=9.5, tail=tail)
