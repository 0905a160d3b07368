"""What holds for every test: nothing that one starts writes into the state folder of whoever runs it; servers that
tests share end with their module; garbage is not looked for among what collecting the tests made; and no example of a
property has a time limit: machines are loaded. A run in a shell's background is told to ignore Ctrl-C, and would hand
that on to the programs that tests interrupt."""

import gc
import os
import signal
import sys
from collections.abc import Generator
from tempfile import TemporaryDirectory

import pytest
from support.endpoints_once import look_once_a_code
from support.shared_servers import end_shared

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # in vLLM's environment, whose tests have no properties
    pass
else:
    settings.register_profile("loaded machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("loaded machine")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _state_folder():
    with TemporaryDirectory(prefix="kvferry-tests-") as folder:
        before, os.environ["XDG_STATE_HOME"] = os.environ.get("XDG_STATE_HOME"), folder
        yield
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before


@pytest.fixture(autouse=True, scope="module")
def _shared_servers():
    yield
    end_shared()
    for kept in vars(sys.modules.get("fastapi.dependencies.models", object)).values():
        if clear := getattr(kept, "cache_clear", None):
            clear()  # it keeps the last thousands of endpoints, and with them all of a router each: gigabytes
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What collecting the tests makes, about a million objects, stays to the end: looking for garbage among it, then
    and later, was a fifth of the time that tests took."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(5000)  # new objects; with the default of 700 it took a tenth of the time of the router's tests
        gc.enable()
        look_once_a_code()
