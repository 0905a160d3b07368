"""What holds for every test: nothing that one starts writes into the state folder of whoever runs it."""

import os
from tempfile import TemporaryDirectory

import pytest


@pytest.fixture(autouse=True, scope="session")
def _state_folder():
    with TemporaryDirectory(prefix="kvferry-tests-") as folder:
        before, os.environ["XDG_STATE_HOME"] = os.environ.get("XDG_STATE_HOME"), folder
        yield
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before
