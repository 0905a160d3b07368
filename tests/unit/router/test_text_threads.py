"""Long texts are made tokens of beside the event loop, a few at a time, and without the interpreter's lock."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from support.router_fakes import make_rig

from router.text.tokenizer import FolderTokenizer, TextThreads
from tests.support.small_tokenizers import byte_level, saved

TOOL = {"type": "function", "function": {"name": "f", "description": "y" * 9000}}


def longest_wait(work: Callable[[], object]) -> float:
    """The longest time for which this thread had no turn while another one did `work`, as a share of all its time."""
    begun: list[float] = []
    ended: list[float] = []

    def run() -> None:
        begun.append(time.perf_counter())
        work()
        ended.append(time.perf_counter())

    thread = threading.Thread(target=run)
    thread.start()
    while not begun:
        pass
    last, longest = begun[0], 0.0
    while not ended:
        now = time.perf_counter()
        last, longest = now, max(longest, now - last)
    thread.join()
    return max(longest, ended[0] - last) / (ended[0] - begun[0])


def waits_until(wanted: Callable[[float], bool], work: Callable[[], object]) -> list[float]:
    """Waits of ten tries, the last of them as wanted or none is: other processes may take either thread's core at any
    time, so a try that shows nothing says nothing."""
    waits: list[float] = []
    while len(waits) < 10 and not any(map(wanted, waits)):
        waits.append(longest_wait(work))
    return waits


def test_encoding_lets_other_threads_run(tmp_path: Path) -> None:
    tokenizer, text = FolderTokenizer(saved(byte_level(), tmp_path)), "the weather there is rather fine, " * 4000
    names = map(str, itertools.count())  # each time somebody else's, so that nothing is known of it

    def encode() -> None:
        tokenizer.encode(text, whose=next(names))

    assert min(waits := waits_until(lambda wait: wait < 0.5, encode)) < 0.5, waits
    numbers = list(range(200_000))
    assert max(waits := waits_until(lambda wait: wait > 0.5, lambda: json.dumps(numbers))) > 0.5, "a held lock is seen"


async def test_so_many_texts_are_worked_on_at_once_and_one_that_nobody_waits_for_never_is() -> None:
    threads, gate, running = TextThreads(2), threading.Event(), threading.Semaphore(0)
    done: list[int] = []

    def work(number: int) -> int:
        running.release()
        gate.wait(30)
        done.append(number)
        return number

    tasks = [asyncio.create_task(threads.run(lambda number=number: work(number))) for number in range(4)]  # type: ignore[misc]
    try:
        for _ in range(2):
            assert await asyncio.to_thread(running.acquire, timeout=30)
        assert not running.acquire(blocking=False) and "queued=2" in repr(threads)
        tasks[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        gate.set()
        assert [await task for task in (*tasks[:2], tasks[3])] == [0, 1, 3]
        assert sorted(done) == [0, 1, 3]
    finally:
        gate.set()
        threads.close()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("more", "beside"),
    [
        ({"messages": [{"role": "user", "content": "x" * 1000}]}, False),
        ({"messages": [{"role": "user", "content": "x" * 1000}] * 9}, True),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 9000}]}]}, True),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [TOOL], "tool_choice": "none"}, True),
        ({"messages": [{"role": "user", "content": "x"}], "documents": [{"text": "y" * 9000}]}, True),
        ({"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"a": {"b": ["y" * 9000]}}}, True),
    ],
)
async def test_long_chats_are_rendered_beside_the_loop(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, object], beside: bool
) -> None:
    rig = await make_rig()
    threads: list[threading.Thread] = []
    render = rig.answerer.tokenizer.render_chat

    def watched(chat: object) -> str:
        threads.append(threading.current_thread())
        return render(chat)[:1000]  # type: ignore[arg-type]

    monkeypatch.setattr(rig.answerer.tokenizer, "render_chat", watched)
    pool = TextThreads(1)
    monkeypatch.setattr(rig.answerer, "_run", pool.run)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        body = json.dumps({"model": "fake-model", "max_tokens": 1, **more})
        assert (await http.post("/v1/chat/completions", content=body)).status_code == 200
    pool.close()
    assert {thread is not threading.current_thread() for thread in threads} == {beside}
