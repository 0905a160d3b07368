"""The scheduler half, call by call as vLLM makes them: what goes wrong, and what is saved. Blocks of 4, chunks of 8.

What it loads is in test_vllm_scheduler_loads.
"""

import pytest
from support.scheduler_half_rig import BLOCK, BLOCKS, CHUNK, Rig, decode, keys_of, root_of
from support.vllm_worker_model import FakeLookup

from engines.vllm.connector.orders import LegParams
from engines.vllm.connector.request_chunks import RequestChunks
from engines.vllm.connector.scheduler_half import SchedulerHalf
from engines.vllm.connector.scheduler_requests import ScheduledRequest
from kvcore.chunk_keys import KeyChain, next_key, owner_of, prompt_keys
from kvcore.clock import ManualClock
from kvcore.errors import ConfigError

# --- what goes wrong


@pytest.mark.parametrize(("chunk_tokens", "block_size"), [(48, 32), (16, 32), (0, 16)])
def test_a_chunk_that_is_no_whole_number_of_blocks_is_refused(chunk_tokens, block_size):
    with pytest.raises(ConfigError, match=r"kv.chunk_tokens.*engine.args.block-size"):
        SchedulerHalf(
            chain_of=lambda salt: KeyChain(root_of(salt)),
            chunk_tokens=chunk_tokens,
            block_size=block_size,
            save_output=True,
            lookup=FakeLookup(),
            clock=ManualClock(),
        )


def test_after_a_load_of_which_nothing_came_the_request_is_computed_and_saved():
    tokens = list(range(20))
    rig = Rig(stored=keys_of(tokens))
    rig.arrive(20)
    rig.load()
    assert rig.half.matched("r", 0) == (0, False)
    (save,) = rig.run(0, 20, admit=True).saves
    assert (save.first_chunk, [place.key for place in save.chunks]) == (0, keys_of(tokens))
    assert rig.half.finished("r")[1].stored_chunks == 0


def test_after_a_failure_nothing_is_loaded_again_whatever_happens():
    rig = Rig(stored=keys_of(list(range(20))))
    rig.arrive(20)
    rig.load()
    assert rig.half.matched("r", 0) == (0, False)
    rig.run(0, 20, admit=True)
    rig.half.build([], ["r"])
    assert rig.half.matched("r", 0) == rig.half.matched("r", 4) == (0, False)


def test_a_handoff_that_failed_is_neither_tried_again_nor_looked_up():
    rig = Rig(stored=keys_of(list(range(20))))
    rig.arrive(20, params=decode(2, tail=True))
    rig.load()
    assert rig.half.matched("r", 0) == (0, False)
    rig.run(0, 20, admit=True)
    rig.half.build([], ["r"])
    assert rig.half.matched("r", 0) == (0, False) and not rig.lookup.questions


def test_chunks_of_a_public_beginning_are_saved_as_nobodys_and_the_rest_as_the_tenants():
    salt, tokens = b"kvt1." + b"a" * 32 + b"." + b"c" * 32 + b".p2", list(range(30))
    rig = Rig()
    rig.arrive(30, salt=salt)
    assert rig.half.matched("r", 0) == (0, False)
    first, second = rig.run(0, 20, admit=True).saves[0], rig.run(20, 10).saves[0]
    keys = prompt_keys(bytes(16), salt, tokens, CHUNK)
    assert [place.key for place in (*first.chunks, *second.chunks)] == keys[:3]
    assert first.public == tuple(keys[:2]) and first.owner == owner_of(salt)
    assert [key for key, _ in first.reserve][:2] == keys[:2]


def test_chunks_behind_the_failed_one_are_saved_again_those_before_are_not():
    tokens = list(range(30))
    rig = Rig(stored=keys_of(tokens))
    rig.arrive(30)
    rig.load()
    (save,) = rig.run(12, 18, admit=True).saves  # the second block of chunk 1 did not come
    assert (save.first_chunk, [place.key for place in save.chunks]) == (1, keys_of(tokens)[1:])
    result = rig.half.finished("r")[1]
    assert (result.stored_chunks, result.ordered_chunks) == (1, 3)


def test_a_failed_tail_is_not_taken_for_stored():
    rig = Rig()
    rig.arrive(24, params=decode(2, tail=True))
    rig.load()
    (save,) = rig.run(16, 8, admit=True).saves
    assert save.first_chunk == 2


def test_an_abort_while_loading_leaves_the_blocks_to_vllm():
    rig = Rig(stored=keys_of(list(range(20))))
    rig.arrive(20)
    rig.load()
    delay, result = rig.half.finished("r")
    assert not delay and not result.saving and rig.is_empty()


def test_a_load_is_ordered_even_if_its_request_ends_before_the_step_does():
    rig = Rig(stored=keys_of(list(range(20))))
    rig.arrive(20)
    rig.half.matched("r", 0)
    rig.half.allocated("r", BLOCKS[:4], 16)
    assert rig.half.finished("r")[0] is False
    assert [load.request_id for load in rig.half.build([], []).loads] == ["r"]
    assert rig.is_empty() and not rig.half.build([], []).loads


def test_an_abort_before_any_block_leaves_nothing():
    rig = Rig(delay=5)
    rig.arrive(20)
    assert rig.half.matched("r", 0) == (None, False)
    assert rig.half.finished("r")[0] is False
    assert rig.is_empty() and rig.lookup.forgotten == ["r"]


def test_blocks_stay_after_the_end_only_while_saves_read_them():
    rig = Rig()
    rig.arrive(20)
    rig.arrive(5, name="short")
    rig.run(0, 20, admit=True)
    rig.run(0, 5, admit=True, name="short")
    delay, result = rig.half.finished("r")
    assert delay and result.saving
    assert rig.half.finished("short")[0] is False
    assert rig.is_empty()


def test_a_preemption_cancels_saves_so_the_end_does_not_wait_for_them():
    rig = Rig()
    rig.arrive(20)
    rig.run(0, 20, admit=True)
    assert rig.half.build([], ["r"]).preempted == ("r",)
    assert rig.half.finished("r")[0] is False


def test_a_save_says_whose_chunks_they_are():
    rig = Rig()
    rig.arrive(20, salt=b"tenant")
    (save,) = rig.run(0, 20, admit=True).saves
    assert save.owner == owner_of(b"tenant")


def test_saves_after_a_preemption_are_ordered_from_the_start_and_waited_for():
    rig = Rig()
    rig.arrive(20)
    rig.run(0, 20, admit=True)
    rig.half.build([], ["r"])
    rig.half.matched("r", 0)
    (save,) = rig.run(0, 20, admit=True).saves
    assert save.first_chunk == 0 and len(save.chunks) == len(save.reserve) == 2
    assert rig.half.finished("r")[0] is True


def test_a_request_without_blocks_is_not_kept_for_saves_that_will_be_cancelled():
    """The prefix cache is reset, which preempts all, and the request is aborted before the next step."""
    rig = Rig()
    rig.arrive(20)
    rig.run(0, 20, admit=True)
    delay, result = rig.half.finished("r", holds_blocks=False)
    assert not delay and not result.saving
    assert rig.half.build([], ["r"]).preempted == ("r",)


def test_a_request_preempted_between_two_steps_may_load_before_the_step_that_says_so():
    rig = early_preempted_rig()
    orders = rig.half.build([], ["r"])
    assert orders.preempted == ("r",) and [load.request_id for load in orders.loads] == ["r"]
    assert rig.half.finished("r")[0] is False  # loading: vLLM waits for the report of the load alone


def test_a_failure_of_such_a_load_is_one_like_any_other():
    rig = early_preempted_rig()
    rig.half.build([], ["r"])
    assert rig.half.matched("r", 0) == (0, False)
    (save,) = rig.run(0, 20, admit=True).saves
    assert save.first_chunk == 0


def early_preempted_rig():
    """Saved two chunks, was preempted between two steps, and loads them."""
    rig = Rig()
    tokens = rig.arrive(20)
    assert rig.half.matched("r", 0) == (0, False)
    rig.run(0, 20, admit=True)
    rig.lookup.stored |= set(keys_of(tokens))
    assert rig.half.matched("r", 0) == (16, True)
    rig.half.allocated("r", BLOCKS[:4], 16)
    return rig


def test_a_request_preempted_between_two_steps_may_run_in_the_step_that_says_so():
    rig = Rig()
    rig.arrive(20)
    rig.run(0, 20, admit=True)
    assert rig.half.matched("r", 0) == (0, False)
    orders = rig.run(0, 20, admit=True, preempted=["r"])
    assert orders.preempted == ("r",) and len(orders.saves) == 1
    assert rig.half.finished("r")[0] is True


def test_a_preemption_of_a_request_that_has_ended_is_passed_on():
    assert Rig().half.build([], ["gone"]).preempted == ("gone",)


def test_a_request_whose_kv_is_not_of_its_tokens_alone_is_left_out():
    tokens = list(range(20))
    rig = Rig(stored=keys_of(tokens))
    rig.arrive(20, params=decode(2, tail=True), cacheable=False)
    rig.arrive(20, name="plain", params=LegParams(leg="leg", tail=True), cacheable=False)
    for name in ("r", "plain"):
        assert rig.half.matched(name, 0) == (0, False)
        assert not rig.run(0, 20, admit=True, name=name).saves
        assert rig.half.finished(name)[0] is False
    assert not rig.lookup.questions


def test_a_block_table_that_is_too_short_is_a_broken_contract():
    rig = Rig()
    rig.arrive(20)
    rig.half.allocated("r", BLOCKS[:5], 0)
    with pytest.raises(AssertionError, match="block table"):
        rig.half.build([ScheduledRequest("r", 0, 20, BLOCKS[:3])], [])


# --- saves


def test_chunks_are_saved_step_by_step_and_room_for_all_is_asked_for_with_the_first():
    rig = Rig()
    tokens = rig.arrive(30, params=LegParams(leg="leg", prefer_segment="d0", tail=True))
    keys = keys_of(tokens)
    tail = next_key(keys[-1], tokens[24:])
    assert not rig.run(0, 5, admit=True).saves
    (first,) = rig.run(5, 13).saves
    assert (first.first_chunk, [place.key for place in first.chunks]) == (0, keys[:2])
    assert first.reserve == ((keys[0], 2), (keys[1], 2), (keys[2], 2), (tail, 2))
    assert (first.leg, first.prefer_segment) == ("leg", "d0")
    (last,) = rig.run(18, 12).saves
    assert (last.first_chunk, [place.key for place in last.chunks]) == (2, [keys[2], tail])
    assert (last.chunks[-1].num_tokens, last.chunks[-1].block_ids) == (6, (106, 107))
    assert not last.reserve
    assert not rig.run(30, 1).saves


def test_a_prompt_shorter_than_a_chunk_is_saved_as_its_tail():
    rig = Rig()
    tokens = rig.arrive(3, params=LegParams(leg="leg", tail=True))
    (save,) = rig.run(0, 3, admit=True).saves
    assert [(place.key, place.block_ids) for place in save.chunks] == [(next_key(root_of(b""), tokens), (100,))]
    assert save.reserve == ((save.chunks[0].key, 1),)
    assert rig.half.finished("r")[1].ordered_chunks == 0


def test_a_tail_as_long_as_a_chunk_is_saved_once():
    rig = Rig()
    tokens = rig.arrive(16, params=LegParams(leg="leg", tail=True))
    (save,) = rig.run(0, 16, admit=True).saves
    assert [place.key for place in save.chunks] == keys_of(tokens)
    assert not rig.run(16, 1).saves


def test_a_tail_is_saved_though_the_store_has_all_before_it():
    tokens = list(range(20))
    rig = Rig(stored=keys_of(tokens))
    rig.arrive(20, params=LegParams(leg="leg", tail=True))
    rig.load()
    (save,) = rig.run(16, 4, admit=True).saves
    assert (save.first_chunk, len(save.chunks), len(save.reserve)) == (2, 1, 1)
    result = rig.half.finished("r")[1]
    assert (result.saving, result.stored_chunks, result.ordered_chunks) == (True, 2, 2)


def test_after_the_tail_the_chunk_that_grows_out_of_it_is_saved_too():
    rig = Rig()
    tokens = rig.arrive(20, params=LegParams(leg="leg", tail=True))
    rig.run(0, 20, admit=True)
    for _ in range(4):
        tokens.append(5)
    (save,) = rig.run(20, 4).saves
    assert [place.key for place in save.chunks] == keys_of(tokens)[2:]


def test_after_a_preemption_the_tail_is_saved_again_before_the_output_behind_it():
    rig = Rig()
    tokens = rig.arrive(20, params=LegParams(leg="leg", tail=True))
    rig.run(0, 20, admit=True)
    tokens += [5] * 13
    rig.half.build([], ["r"])
    rig.half.matched("r", 0)
    (save,) = rig.run(0, 33, admit=True).saves
    assert [place.num_tokens for place in save.chunks] == [8, 8, 4]
    (save,) = rig.run(33, 1).saves
    assert (save.first_chunk, [place.key for place in save.chunks]) == (2, keys_of(tokens)[2:])


def test_a_tail_inside_a_chunk_that_the_store_has_holds_up_no_save():
    rig = Rig()
    tokens = rig.arrive(20, params=LegParams(leg="leg", tail=True))
    rig.run(0, 20, admit=True)
    tokens += [5] * 13
    rig.half.build([], ["r"])
    rig.lookup.stored |= set(keys_of(tokens)[:3])
    rig.load()
    (save,) = rig.run(24, 9, admit=True).saves
    assert [place.key for place in save.chunks] == keys_of(tokens)[3:]


def test_without_save_output_no_chunk_with_a_generated_token_is_saved():
    rig = Rig(save_output=False)
    tokens = rig.arrive(20)
    (save,) = rig.run(0, 20, admit=True).saves
    tokens += [5] * 20
    assert len(save.chunks) == 2 and not rig.run(20, 20).saves


def test_tokens_that_nobody_knows_yet_make_no_chunk():
    """With asynchronous scheduling a step is ordered before the token that it computes was sampled; drafts may be
    rejected."""
    rig = Rig()
    tokens = rig.arrive(15)
    rig.run(0, 15, admit=True)
    assert not rig.run(15, 3).saves
    tokens.append(5)
    assert len(rig.run(16, 3).saves) == 1


def test_a_local_hit_is_offered_as_the_store_may_have_lost_it():
    rig = Rig()
    rig.arrive(20)
    assert rig.half.matched("r", 16) == (0, False)
    (save,) = rig.run(16, 4, admit=True).saves
    assert (save.first_chunk, len(save.chunks)) == (0, 2)


def test_what_the_store_has_is_not_offered():
    rig = Rig(stored=keys_of(list(range(30)))[:1])
    rig.arrive(30)
    assert rig.half.matched("r", 16) == (0, False)
    (save,) = rig.run(16, 14, admit=True).saves
    assert (save.first_chunk, len(save.chunks)) == (1, 2)


# --- a request's chunks


def test_keys_and_places_are_those_of_the_tokens_however_they_are_asked_for():
    tokens = list(range(20))
    chunks = RequestChunks(KeyChain(root_of(b"")), tokens, chunk_tokens=CHUNK, block_size=BLOCK)
    keys = keys_of(tokens)
    assert chunks.keys(0) == [] and chunks.key(2, 20) == next_key(keys[1], tokens[16:])
    assert chunks.keys(1) == keys[:1]
    tokens += range(20, 24)
    assert chunks.keys(3) == keys_of(tokens)
    assert [place.num_tokens for place in chunks.places(1, 22, BLOCKS)] == [8, 6]
    with pytest.raises(AssertionError, match="tokens are known"):
        chunks.keys(4)
