"""`python -m decoder --config FILE [--node NAME] [--set PATH=VALUE]...`: runs one decoder."""

import sys

from kvcore.types import Role
from kvnode import command


def main() -> None:
    """Entry point of the program."""
    sys.exit(command.main(Role.DECODER, "decoder"))


if __name__ == "__main__":
    main()
