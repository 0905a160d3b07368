from hypothesis import given, settings
from hypothesis import strategies as st

from transfer.fragments import MESSAGE_BYTES, Fragment, cut

SIZES = st.one_of(st.integers(1, 300), st.sampled_from([64 << 10, (64 << 10) + 1, MESSAGE_BYTES, MESSAGE_BYTES + 1]))


@settings(deadline=None)
@given(st.lists(st.tuples(SIZES, st.sampled_from([0, 0, 1])), max_size=12), st.booleans())
def test_a_write_covers_every_byte_once_in_messages_that_fit(plan: list[tuple[int, int]], one_at_a_time: bool) -> None:
    fragments, at = [], 0
    for number, (size, gap) in enumerate(plan):
        fragments.append(Fragment(at + gap, memoryview(bytes([number + 1]) * size)))
        at += gap + size
    wanted, found = bytearray(at), bytearray(at)
    for fragment in fragments:
        wanted[fragment.offset : fragment.offset + fragment.view.nbytes] = fragment.view
    messages = list(cut(fragments, reading=False, one_at_a_time=one_at_a_time))
    for message in messages:
        end = message.offset + message.view.nbytes
        assert found.count(0, message.offset, end) == message.view.nbytes
        found[message.offset : end] = message.view
    assert found == wanted
    assert not one_at_a_time or all(0 < message.view.nbytes <= MESSAGE_BYTES for message in messages)


@given(st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0, 0, 1])), min_size=1, max_size=12))
def test_a_read_of_small_neighbours_is_one_message_and_reaches_each_buffer(plan: list[tuple[int, int]]) -> None:
    source = bytes(range(256)) * 20
    fragments, at = [], 0
    for size, gap in plan:
        fragments.append(Fragment(at + gap, memoryview(bytearray(size))))
        at += gap + size
    messages = list(cut(fragments, reading=True, one_at_a_time=True))
    assert len(messages) == 1 + sum(gap for _, gap in plan[1:])
    for message in messages:
        message.view[:] = source[message.offset : message.offset + message.view.nbytes]
        message.scatter()
    for fragment in fragments:
        assert fragment.view == source[fragment.offset : fragment.offset + fragment.view.nbytes]
