"""A Docker daemon of a test's own, and a small base image of this machine's Python, as nothing can be pulled."""

import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from packaging.requirements import Requirement

from kvcore.process import child_exec

PROGRAMS = ("sh", "mkdir", "chown", "redis-server")
BASE = "kvferry-test-base"


@contextmanager
def docker_daemon() -> Iterator[dict[str, str]]:
    """The environment that `docker` and `docker-compose` need. Skips, by the name of what is missing."""
    for program in ("dockerd", "docker", "docker-compose", "redis-server"):
        if shutil.which(program) is None:
            pytest.skip(f"no {program} here")
    if os.geteuid() != 0:
        pytest.skip("a Docker daemon of its own needs root")
    with TemporaryDirectory() as folder:
        socket = f"unix://{folder}/docker.sock"
        command = ["dockerd", "-H", socket, "--iptables=false", "--ip6tables=false", "--data-root", f"{folder}/data"]
        command += ["--exec-root", f"{folder}/exec", "-p", f"{folder}/pid"]
        trampoline = [sys.executable, "-I", "-S", child_exec.__file__, str(os.getpid())]
        environment = {**os.environ, "DOCKER_HOST": socket, "COMPOSE_PROJECT_NAME": "kvferry-test"}
        environment["DOCKER_BUILDKIT"] = "0"
        with (Path(folder) / "log").open("w+b") as log:
            daemon = subprocess.Popen([*trampoline, *command], stdout=log, stderr=log)
            try:
                if not _answers(daemon, environment):
                    log.seek(0)
                    pytest.skip(f"no Docker daemon can be started here: {log.read()[-300:].decode(errors='replace')}")
                yield environment
            finally:
                daemon.terminate()
                daemon.wait(60)


def _answers(daemon: subprocess.Popen[bytes], environment: dict[str, str]) -> bool:
    for _ in range(100):
        if subprocess.run(["docker", "info"], env=environment, capture_output=True, check=False).returncode == 0:
            return True
        try:
            daemon.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        return False
    return False


def import_base(environment: dict[str, str]) -> None:
    """The image BASE: this Python with what kvferry needs of packages, and PROGRAMS, where they are here."""
    stdlib = Path(sysconfig.get_path("stdlib", vars={"base": sys.base_prefix, "installed_base": sys.base_prefix}))
    python = Path(os.path.realpath(sys.executable))
    files: dict[str, Path] = {str(python): python}
    for path in stdlib.rglob("*"):
        inside = path.relative_to(stdlib).parts
        if path.is_file() and not {"site-packages", "dist-packages", "test", "__pycache__"} & set(inside):
            files[str(path)] = path
    for name in _needed({"kvferry"}) | {"pip", "setuptools", "wheel"}:
        for file in _files(name):
            if file[1].is_file() and "__pycache__" not in file[0].parts:
                files[str(stdlib / "site-packages" / file[0])] = file[1]
    for program in PROGRAMS:
        found = shutil.which(program)
        assert found is not None
        files[f"/usr/bin/{program}"] = Path(os.path.realpath(found))
    programs = {python, *(files[f"/usr/bin/{program}"] for program in PROGRAMS)}
    native = [path for path in files.values() if ".so" in path.name or path in programs]
    files |= {library: Path(os.path.realpath(library)) for library in _libraries(native)}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for at, path in {os.path.normpath(at): path for at, path in files.items()}.items():
            archive.add(path, at, recursive=False)
        for at, target in {"bin": "usr/bin", "usr/local/bin/python3": str(python)}.items():
            link = tarfile.TarInfo(at)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for folder in ("tmp", "etc"):
            made = tarfile.TarInfo(folder)
            made.type, made.mode = tarfile.DIRTYPE, 0o1777
            archive.addfile(made)
    changes = ["--change", "ENV PATH=/usr/local/bin:/usr/bin:/bin"]
    subprocess.run(["docker", "import", *changes, "-", BASE], input=raw.getvalue(), env=environment, check=True)


def _needed(names: set[str]) -> set[str]:
    """Distributions that these need, without extras."""
    done, left = set[str](), {*names}
    while left:
        name = left.pop()
        done.add(name)
        for text in importlib.metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                left |= {re.sub(r"[-_.]+", "-", needed.name).lower()} - done
    return done - names


def _files(name: str) -> list[tuple[Path, Path]]:
    """(place below site-packages, file) of what a distribution installed there."""
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return []
    return [(Path(file), Path(str(found.locate_file(file)))) for file in found.files or [] if ".." not in file.parts]


def _libraries(native: Sequence[Path]) -> set[str]:
    said = subprocess.run(["ldd", *map(str, native)], capture_output=True, text=True, check=False).stdout
    found = {os.path.normpath(path) for path in re.findall(r"(/[^\s:]+) \(0x", said)}
    return {path for path in found if not path.startswith(sys.prefix)}
