"""Engines that share a GPU start one after the other, those with GPUs of their own at once."""

import asyncio
import os

import pytest

from engines.vllm.gpu_turns import gpu_turn, gpus_of


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "kvferry"


class Starting:
    """An engine that starts once it is let in, and is through once told."""

    def __init__(self, *gpus: str) -> None:
        self.inside, self.through = asyncio.Event(), asyncio.Event()
        self.task = asyncio.create_task(self._run(gpus))

    async def _run(self, gpus: tuple[str, ...]) -> None:
        async with gpu_turn(gpus):
            self.inside.set()
            await self.through.wait()

    async def ends(self) -> None:
        self.through.set()
        await self.task


@pytest.mark.parametrize(
    ("visible", "ranks", "gpus"),
    [
        (None, 1, ["0"]),
        ("", 2, ["0", "1"]),
        ("3", 1, ["3"]),
        ("2, 1,0", 2, ["1", "2"]),
        ("GPU-7", 1, ["GPU-7"]),
    ],
)
def test_the_gpus_of_an_engine_are_the_first_that_it_may_see(visible, ranks, gpus):
    assert gpus_of({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, ranks) == gpus


async def test_two_of_one_gpu_take_turns_and_a_third_of_another_does_not_wait():
    async with asyncio.timeout(30):
        first = Starting("0")
        await first.inside.wait()
        second, other = Starting("0", "1"), Starting("2")
        await other.inside.wait()
        assert not second.inside.is_set()
        await first.ends()
        await second.inside.wait()
        await asyncio.gather(second.ends(), other.ends())


async def test_the_turn_of_one_that_failed_or_was_cancelled_is_over():
    async with asyncio.timeout(30):
        with pytest.raises(RuntimeError, match="no memory"):
            async with gpu_turn(["0"]):
                raise RuntimeError("no memory")
        first = Starting("0")
        await first.inside.wait()
        waiting = Starting("0")
        await asyncio.sleep(0)
        waiting.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting.task
        await first.ends()
        await Starting("0").ends()


async def test_a_turn_is_over_though_a_process_forked_meanwhile_lives_on():
    hold, child_end = os.pipe()
    async with gpu_turn(["0"]):
        pid = os.fork()
        if not pid:
            os.close(child_end)
            os.read(hold, 1)
            os._exit(0)
    os.close(hold)
    try:
        async with asyncio.timeout(30), gpu_turn(["0"]):
            pass
    finally:
        os.close(child_end)
        await asyncio.to_thread(os.waitpid, pid, 0)


async def test_without_a_folder_for_locks_there_are_no_turns(state):
    state.parent.write_bytes(b"not a folder")
    async with asyncio.timeout(30), gpu_turn(["0"]), gpu_turn(["0"]):
        pass
