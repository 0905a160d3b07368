"""BlockManager against random use: invariants after every operation, nothing lost, reuse is whole and right."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support.machines import longer, machine_settings

from engines.paged.blocks import BlockManager
from kvcore.types import ChunkKey

PER_CHUNK = 2


class Blocks(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(12, 4, PER_CHUNK)
        self.held: list[list[int]] = []
        self.sealed: dict[ChunkKey, tuple[int, ...]] = {}

    @rule(count=st.integers(0, 14))
    def allocate(self, count):
        if not self.blocks.can_allocate(count):
            return
        taken = self.blocks.allocate(count)
        in_use = {block for blocks in self.held for block in blocks}
        assert len(set(taken)) == count and not in_use & set(taken)
        self.sealed = {key: blocks for key, blocks in self.sealed.items() if not set(blocks) & set(taken)}
        self.held.append(taken)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        self.blocks.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def retain(self, data):
        blocks = data.draw(st.sampled_from(self.held))
        self.blocks.retain(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: any(len(blocks) >= PER_CHUNK for blocks in self.held))
    @rule(data=st.data(), number=st.integers(0, 5))
    def seal(self, data, number):
        blocks = data.draw(st.sampled_from([b for b in self.held if len(b) >= PER_CHUNK]))[:PER_CHUNK]
        key = ChunkKey(bytes([number]) * 16)
        in_chunks = {block for chunk in self.sealed.values() for block in chunk}
        if set(blocks) & in_chunks and blocks[0] not in in_chunks:
            return  # no sequence's chunks overlap so
        if self.blocks.seal(key, blocks):
            assert key not in self.sealed
            self.sealed[key] = tuple(blocks)

    @rule(number=st.integers(0, 5))
    def take(self, number):
        key = ChunkKey(bytes([number]) * 16)
        found = self.blocks.reuse_chunk(key)
        assert found == self.sealed.get(key)
        if found:
            self.held.append(list(found))

    @invariant()
    def holds(self):
        self.blocks.check()
        in_use = {block for blocks in self.held for block in blocks}
        assert self.blocks.used_blocks >= len(in_use)
        assert self.blocks.used_blocks + self.blocks.available_blocks == 12

    def teardown(self):
        for blocks in self.held:
            self.blocks.release(blocks)
        self.blocks.check()
        assert self.blocks.used_blocks == 0


TestBlocks = Blocks.TestCase
TestBlocks.settings = machine_settings(25)
TestLongBlocks = longer(Blocks, 75)
