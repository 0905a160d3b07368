"""`python -m kvnode --config FILE [--node NAME] [--set PATH=VALUE]...`: runs one store-only node."""

import sys

from kvcore.types import Role
from kvnode import command


def main() -> None:
    """Entry point of the program."""
    sys.exit(command.main(Role.STORE, "kvnode"))


if __name__ == "__main__":
    main()
