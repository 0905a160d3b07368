"""The command line of a node's process: `prefiller`, `decoder` and `kvnode` differ in the role that they serve only.

Owns arguments and the choice of the node; `kvnode.service` runs it.
"""

from collections.abc import Sequence

from kvcore.config.file import node_config
from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError
from kvcore.process.command import config_parser, run_configured
from kvcore.process.service import Main
from kvcore.types import Role
from kvnode.service import run_node


def main(role: Role, program: str, arguments: Sequence[str] | None = None) -> int:
    """Run one node of `role` until it is told to stop; returns the exit code (2: ConfigError, said on stderr)."""
    parser = config_parser(program, f"One {role} node of a kvferry cluster.")
    parser.add_argument("--node", metavar="NAME", help=f"its name under `nodes`; not needed if only one is a {role}")
    options = parser.parse_args(arguments)

    def choose(config: ClusterConfig) -> tuple[str, Main]:
        name = choose_node(config, role, options.node)
        return name, lambda lifecycle: run_node(config, name, lifecycle)

    return run_configured(program, options, choose)


def choose_node(config: ClusterConfig, role: Role, name: str | None) -> str:
    """The node to run: `name`, or the only one of `role`. Raises ConfigError listing the nodes of the role."""
    candidates = [node for node, settings in config.nodes.items() if settings.role is role]
    listed = f"nodes of role {role}: {', '.join(candidates) or 'none'}"
    if name is None:
        if len(candidates) == 1:
            return candidates[0]
        raise ConfigError(f"--node is missing; {listed}")
    found = node_config(config, name).role
    if found is not role:
        raise ConfigError(f"--node {name}: it is a {found}, not a {role}; {listed}")
    return name
