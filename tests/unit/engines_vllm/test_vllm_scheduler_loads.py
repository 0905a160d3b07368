"""What the scheduler half loads: lookups, local hits, handoffs. Chunks of 8 tokens, blocks of 4."""

import pytest
from support.scheduler_half_rig import BLOCKS, CHUNK, Rig, decode, keys_of

from engines.vllm.connector.orders import LegParams
from engines.vllm.connector.request_chunks import handed_off_tokens
from kvcore.chunk_keys import next_key

# --- lookups


def test_the_lookup_begins_with_the_request_and_names_the_chunks_that_may_be_reused():
    rig = Rig()
    tokens = rig.arrive(24, salt=b"tenant")
    assert rig.lookup.questions["r"][1] == keys_of(tokens, b"tenant")[:2]


def test_a_prompt_without_usable_chunks_asks_nobody():
    rig = Rig()
    rig.arrive(8)
    assert rig.half.matched("r", 0) == (0, False)
    assert not rig.lookup.questions and not rig.lookup.waits


def test_nothing_is_said_until_the_answer_is_there_and_it_is_not_asked_for_again():
    rig = Rig(stored=keys_of(list(range(20))), delay=2)
    rig.arrive(20)
    said = [rig.half.matched("r", 0) for _ in range(5)]
    assert said == [(None, False)] * 2 + [(16, True)] * 3
    assert len(rig.lookup.waits) == 3


def test_the_engine_waits_once_a_request_and_once_a_step():
    rig = Rig(delay=9)
    for name in "abc":
        rig.arrive(20, name=name)
    waits = []
    for _ in range(4):
        rig.lookup.waits.clear()
        for name in "abc":
            rig.half.matched(name, 0)
        waits.append(list(rig.lookup.waits))
        rig.half.build([], [])
    assert waits == [[0.002, 0, 0], [0, 0.002, 0], [0, 0, 0.002], [0, 0, 0]]


def test_an_answer_beyond_the_question_counts_for_what_was_asked():
    rig = Rig()
    rig.lookup.answer = lambda request_id, *, wait_s: 7
    rig.arrive(20)
    assert rig.half.matched("r", 0) == (16, True)


@pytest.mark.parametrize(("num_local", "said"), [(0, (16, True)), (8, (8, True)), (12, (4, True)), (16, (0, False))])
def test_what_the_store_has_beyond_the_local_hit_is_loaded(num_local, said):
    rig = Rig(stored=keys_of(list(range(20))))
    rig.arrive(20)
    assert rig.half.matched("r", num_local) == said


def test_a_load_begins_within_a_chunk_when_the_local_hit_ends_there():
    rig = Rig(stored=keys_of(list(range(30))))
    tokens = rig.arrive(30, params=LegParams(leg="leg"))
    order = rig.load(12)
    assert (order.first_chunk, order.keep_blocks, order.wait_until, order.leg) == (1, 1, None, "leg")
    assert [place.key for place in order.chunks] == keys_of(tokens)[1:]
    assert [place.block_ids for place in order.chunks] == [(102, 103), (104, 105)]


def test_of_a_load_cut_short_by_vllm_the_last_chunk_is_named_by_what_is_there_of_it():
    rig = Rig(stored=keys_of(list(range(30))))
    tokens = rig.arrive(30)
    assert rig.half.matched("r", 0) == (24, True)
    rig.half.allocated("r", BLOCKS[:5], 20)
    (order,) = rig.half.build([], []).loads
    keys = keys_of(tokens)
    assert [place.key for place in order.chunks] == [*keys[:2], next_key(keys[1], tokens[16:20])]
    assert order.chunks[-1].block_ids == (104,)


def test_a_hit_that_vllm_does_not_take_is_not_saved_again():
    rig = Rig(stored=keys_of(list(range(30)))[:2])
    rig.arrive(30)
    assert rig.half.matched("r", 0) == (16, True)
    (save,) = rig.run(0, 30, admit=True).saves
    assert save.first_chunk == 2


def test_after_a_preemption_prompt_and_output_are_looked_up():
    rig = Rig()
    tokens = rig.arrive(20)
    rig.run(0, 20, admit=True)
    tokens += range(70, 76)
    rig.half.build([], ["r"])
    rig.lookup.stored |= set(keys_of(tokens))
    assert rig.half.matched("r", 0) == (24, True)
    assert rig.load().chunks[-1].key == keys_of(tokens)[2]


# --- handoffs


@pytest.mark.parametrize(
    ("num_tokens", "chunks", "tail", "expected"),
    [
        (20, 2, True, 20),
        (20, 2, False, 16),
        (20, 9, True, 20),
        (20, 1, True, 8),
        (20, 0, False, 0),
        (24, 2, True, 24),
        (24, 3, False, 16),
        (5, 0, True, 5),
        (20, None, True, 0),
    ],
)
def test_how_much_of_a_prompt_is_handed_off(num_tokens, chunks, tail, expected):
    assert handed_off_tokens(decode(chunks, tail=tail), num_tokens, CHUNK) == expected


def test_a_handoff_is_expected_without_a_lookup_and_waited_for():
    rig = Rig()
    tokens = rig.arrive(22, params=decode(2, tail=True))
    order = rig.load()
    keys = keys_of(tokens)
    assert not rig.lookup.questions and (order.wait_until, order.leg) == (9.5, "leg")
    assert [place.key for place in order.chunks] == [*keys, next_key(keys[-1], tokens[16:])]
    assert [place.num_tokens for place in order.chunks] == [8, 8, 6]
    assert order.chunks[-1].block_ids == (104, 105)


def test_a_tail_as_long_as_a_chunk_is_that_chunk():
    rig = Rig()
    tokens = rig.arrive(24, params=decode(2, tail=True))
    assert [place.key for place in rig.load().chunks] == keys_of(tokens)
    assert not rig.run(23, 1, admit=True).saves
    result = rig.half.finished("r")[1]
    assert (result.stored_chunks, result.saving) == (3, False)


@pytest.mark.parametrize(("num_tokens", "num_local"), [(1, 0), (17, 16)])
def test_a_handoff_that_would_save_no_token_is_not_loaded(num_tokens, num_local):
    rig = Rig()
    rig.arrive(num_tokens, params=decode(num_local // CHUNK, tail=True))
    assert rig.half.matched("r", num_local) == (0, False)


def test_a_handoff_behind_a_local_hit_loads_the_rest():
    rig = Rig()
    rig.arrive(22, params=decode(2, tail=True))
    order = rig.load(12)
    assert (order.first_chunk, order.keep_blocks, len(order.chunks)) == (1, 1, 2)


def test_a_handoff_is_one_shot_after_that_the_store_is_looked_up():
    rig = Rig()
    tokens = rig.arrive(22, params=decode(2, tail=True))
    rig.load()
    rig.run(21, 1, admit=True)
    rig.half.build([], ["r"])
    assert rig.half.matched("r", 0) == (0, False)
    rig.half.build([], ["r"])
    rig.lookup.stored |= set(keys_of(tokens))
    assert rig.load().wait_until is None


def test_what_was_handed_off_is_not_saved_again_what_is_generated_is():
    rig = Rig()
    tokens = rig.arrive(22, params=decode(2, tail=True))
    rig.load()
    assert not rig.run(21, 1, admit=True).saves
    tokens += [7]
    assert not rig.run(22, 1).saves
    tokens += [7]
    (save,) = rig.run(23, 1).saves
    assert (save.first_chunk, [place.key for place in save.chunks]) == (2, keys_of(tokens)[2:])
