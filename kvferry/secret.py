"""`kvferry secret new FILE`: make the cluster's secret, or put a new one before the one that there is; and `certs`."""

import argparse
import os
from pathlib import Path

from kvcore.errors import ConfigError
from kvcore.trust.secret_text import BadSecretError, new_secret, parse_secrets


def add_secret(parser: argparse.ArgumentParser) -> None:
    """Its commands, and their help."""
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    text = "write a new secret into a file that only its owner can read"
    new = commands.add_parser("new", help=text, description=text)
    new.set_defaults(command=lambda arguments: run_new(arguments.file, rotate=arguments.rotate))
    new.add_argument("file", type=Path, metavar="FILE")
    text = "FILE has one: the new one signs from now on, and the newest of before is accepted too"
    new.add_argument("--rotate", action="store_true", help=text)
    text = "write a CA, unless FOLDER has one, and new certificates of all processes of a cluster file"
    certs = commands.add_parser("certs", help=text, description=text)
    certs.set_defaults(command=_run_certs)
    certs.add_argument("folder", type=Path, metavar="FOLDER")
    certs.add_argument("--config", type=Path, required=True, help="the cluster file, which names the processes")
    certs.add_argument("--days", type=_days, default=365.0, help="how long the certificates hold (default: 365)")


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days <= 36_500:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of days, above 0 and up to 36500")
    return days


def _run_certs(arguments: argparse.Namespace) -> int:
    from kvferry.certificates import run_certs

    return run_certs(arguments.folder, arguments.config, arguments.days)


def run_new(file: Path, *, rotate: bool) -> int:
    """Write FILE, whole or not at all; returns 0. Raises ConfigError."""
    lines = [new_secret()]
    if rotate:
        lines.append(_newest(file))
    elif file.exists():
        raise ConfigError(f"{file} exists; --rotate puts a new secret before the one in it")
    written = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w") as out:
            if rotate:
                make_like(out.fileno(), file.stat())
            out.write("\n".join(lines) + "\n")
            out.flush()
            os.fsync(out.fileno())
        if rotate:
            written.replace(file)
        else:
            os.link(written, file)  # not over one that came meanwhile
            written.unlink()
    except OSError as error:
        written.unlink(missing_ok=True)
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from error
    print(f"{file}: a new secret" + (", and the one before it" if rotate else ""))
    return 0


def make_like(descriptor: int, before: os.stat_result) -> None:
    """Owner, group and mode of the file that it is about to replace: who reads that one reads this one, also where root
    changes it. Raises OSError."""
    made = os.fstat(descriptor)
    if (made.st_uid, made.st_gid) != (before.st_uid, before.st_gid):
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, before.st_mode & 0o640)


def _newest(file: Path) -> str:
    try:
        text = file.read_text("ascii")
        parse_secrets(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except BadSecretError as error:
        raise ConfigError(f"{file} holds no secret: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file} holds no secret: not a text") from None
    lines = (line.strip() for line in text.splitlines())
    return next(line for line in lines if line and not line.startswith("#"))
