"""Where a cluster's processes keep on this machine what outlives them: logs, records."""

import os
from pathlib import Path


def state_folder(cluster: str) -> Path:
    """A folder under the user's state folder (XDG), which may not be there yet."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "kvferry" / cluster
