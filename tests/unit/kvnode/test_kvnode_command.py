"""Which node a command line means."""

import pytest
from support.fake_engine import cluster_config

from kvcore.errors import ConfigError
from kvcore.types import Role
from kvnode.command import choose_node


def test_only_node_of_the_role_needs_no_name() -> None:
    assert choose_node(cluster_config(), Role.DECODER, None) == "d0"


def test_node_of_another_role_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"p0: it is a prefiller, not a decoder; nodes of role decoder: d0"):
        choose_node(cluster_config(), Role.DECODER, "p0")


def test_unknown_node_is_refused() -> None:
    with pytest.raises(ConfigError, match="d9"):
        choose_node(cluster_config(), Role.DECODER, "d9")
