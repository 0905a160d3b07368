import re
import signal
import subprocess
import sys
import textwrap

import pytest

HEAD = """
import asyncio, os, signal, sys
from kvcore.process.child import ChildProcess
from kvcore.errors import ConfigError
from kvcore.process.service import run_process

def say(text):
    print(text, flush=True)

def close(name):
    async def closed():
        say("closed " + name)
    return closed
"""


def start(code: str) -> subprocess.Popen[str]:
    whole = HEAD + textwrap.dedent(code) + "\nsys.exit(run_process('unit', main))\n"
    return subprocess.Popen([sys.executable, "-c", whole], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, out, err


def test_a_background_task_that_dies_takes_the_process_down_and_the_stack_unwinds():
    code = """
        async def broken():
            raise RuntimeError("heartbeat broke")
        async def main(lifecycle):
            lifecycle.stack.push_async_callback(close("a"))
            lifecycle.stack.push_async_callback(close("b"))
            lifecycle.tasks.create_task(broken())
            lifecycle.ready()
            await lifecycle.stopping.wait()
    """
    returncode, out, err = finish(start(code))
    assert (returncode, out) == (1, "closed b\nclosed a\n")
    assert "process_failed" in err and "RuntimeError: heartbeat broke" in err


def test_a_config_error_is_one_line_and_exit_code_2():
    returncode, out, err = finish(start("async def main(lifecycle):\n    raise ConfigError('port 1 is taken')"))
    assert (returncode, out, err) == (2, "", "unit: error: port 1 is taken\n")


def test_a_config_error_of_a_background_task_is_one_line_too():
    code = """
        async def late():
            raise ConfigError("no such device")
        async def main(lifecycle):
            lifecycle.tasks.create_task(late())
            await lifecycle.stopping.wait()
    """
    returncode, _, err = finish(start(code))
    assert (returncode, err) == (2, "unit: error: no such device\n")


def test_a_failure_of_main_is_exit_code_1():
    returncode, _, err = finish(start("async def main(lifecycle):\n    raise KeyError('x')"))
    assert returncode == 1 and "KeyError: 'x'" in err


def test_a_terminal_that_closes_ends_neither_the_process_nor_what_it_starts():
    code = """
        async def main(lifecycle):
            lifecycle.ready()
            child = await ChildProcess.start(["sh", "-c", "kill -HUP $$; echo goes on"], on_line=say)
            say(await child.wait())
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
            say("goes on too")
    """
    returncode, out, _ = finish(start(code))
    assert (returncode, out) == (0, "goes on\n0\ngoes on too\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_in_order_and_cancels_the_rest(number):
    code = """
        async def forever():
            try:
                await asyncio.Event().wait()
            finally:
                say("task ended")
        async def main(lifecycle):
            lifecycle.stack.push_async_callback(close("a"))
            lifecycle.tasks.create_task(forever())
            await asyncio.sleep(0)
            say(lifecycle)
            lifecycle.ready(port=1)
            say(lifecycle)
            say("up")
            await lifecycle.stopping.wait()
            say(lifecycle)
            say("drained")
    """
    process = start(code)
    said = [process.stdout.readline() for _ in range(3)]
    assert said == ["<Lifecycle starting>\n", "<Lifecycle ready>\n", "up\n"]
    process.send_signal(number)
    returncode, out, err = finish(process)
    assert (returncode, out) == (0, "<Lifecycle stopping>\ndrained\nclosed a\ntask ended\n")
    assert " ready pid=" in err and "port=1" in err


def test_a_signal_during_start_up_cancels_it():
    code = """
        async def main(lifecycle):
            lifecycle.stack.push_async_callback(close("a"))
            say("loading")
            await asyncio.Event().wait()
    """
    process = start(code)
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGTERM)
    assert finish(process)[:2] == (0, "closed a\n")


def test_the_second_signal_ends_at_once_and_kills_the_children():
    code = """
        async def main(lifecycle):
            child = await ChildProcess.start([sys.executable, "-c", "import time; time.sleep(60)"])
            lifecycle.ready()
            say(child.pid)
            await lifecycle.stopping.wait()
            say("draining")
            await asyncio.Event().wait()
    """
    process = start(code)
    assert int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "draining\n"
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 130


def test_sigusr1_writes_where_tasks_stand_and_what_parts_say_and_no_value_and_ends_nothing():
    code = """
        async def numbers(prompt):
            await asyncio.Event().wait()
            yield prompt
        async def reads(prompt):
            async for _ in numbers(prompt):
                pass
        def broken():
            raise ValueError("secret")
        async def main(lifecycle):
            lifecycle.tasks.create_task(reads("secret"), name="reader")
            lifecycle.describe += [lambda: ["<Part one>", "<Part two>"], broken]
            await asyncio.sleep(0)
            lifecycle.ready()
            say("up")
            await lifecycle.stopping.wait()
    """
    process = start(code)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR1)
    log = []
    while not log or " dump_end" not in log[-1]:
        log.append(process.stderr.readline())
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 0
    text = "".join(log)
    # one line a task: its name, its coroutine and the innermost frame, seen through an asynchronous generator
    (reader,) = [line for line in log if " dump_task name=reader " in line]
    assert re.search(r'runs=reads at=".*locks.py:\d+ wait"', reader), reader
    assert 'of="<Part one>"' in text and 'of="<Part two>"' in text and "ValueError" in text
    assert "secret" not in text


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_one_for_it_and_its_children():
    code = """
        import resource, subprocess
        async def main(lifecycle):
            say(resource.getrlimit(resource.RLIMIT_NOFILE))
            say(subprocess.run(["sh", "-c", "ulimit -Sn"], capture_output=True, text=True).stdout.strip())
        resource.setrlimit(resource.RLIMIT_NOFILE, (100, 300))
    """
    assert finish(start(code))[:2] == (0, "(300, 300)\n300\n")


def test_what_is_there_when_a_process_is_ready_is_collected_no_more():
    code = """
        import gc
        async def main(lifecycle):
            say(gc.get_freeze_count())
            lifecycle.ready()
            say(gc.get_freeze_count() > 1000)
    """
    assert finish(start(code))[:2] == (0, "0\nTrue\n")
