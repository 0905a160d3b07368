"""Where a cluster's processes keep on this machine what outlives them: logs, records."""

import os
from pathlib import Path

from kvcore.errors import ConfigError


def state_folder(cluster: str) -> Path:
    """A folder under the user's state folder (XDG), which may not be there yet. Raises ConfigError: nobody knows it."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        return Path(state).expanduser() / "kvferry" / cluster
    except RuntimeError as error:
        raise ConfigError("this user has no home folder; XDG_STATE_HOME says where state is kept instead") from error
