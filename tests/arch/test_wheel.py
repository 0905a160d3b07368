"""The wheel holds our packages and nothing else, and no other distribution claims our top-level names."""

import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # it is built and installed
PACKAGES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "src"
    source.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif name and (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)],
        check=True,
        capture_output=True,
        timeout=100,
    )
    return next(out.glob("*.whl"))


def test_the_wheel_holds_exactly_the_listed_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    folders = {str(Path(n).parent).replace("/", ".") for n in names if n.endswith(".py")}
    assert folders == set(PACKAGES)
    assert not [n for n in names if n.split("/")[0] in ("tests", "configs", "benchmarks")]


def test_the_wheel_holds_the_example_cluster_files(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("kvferry/configs/")}
    assert names == {f"kvferry/configs/{file.name}" for file in (ROOT / "configs").iterdir()}


def test_each_top_level_package_says_that_it_is_typed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package.split('.')[0]}/py.typed" for package in PACKAGES} <= names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The Python of a venv in which the wheel is, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    )
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site.stdout.strip()]
    subprocess.run([*pip, str(wheel)], check=True, timeout=60)
    return python


def test_our_names_belong_to_us_alone(installed, tmp_path):
    """In a venv that sees our dependencies, each of our import names comes from exactly one distribution."""
    code = "import json, importlib.metadata as m; print(json.dumps(dict(m.packages_distributions())))"
    alone = subprocess.run([installed, "-c", code], capture_output=True, text=True, check=True)
    owners = json.loads(alone.stdout)
    ours = {name.split(".")[0] for name in PACKAGES}
    assert {name for name, dists in owners.items() if "kvferry" in dists} == ours
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    clashes = {n: d for n, d in json.loads(here.stdout).items() if n in ours and set(d) != {"kvferry"}}
    assert not clashes, clashes


def test_an_installation_has_the_cluster_files_that_the_pages_name(installed, tmp_path):
    """Anywhere, without the sources: `kvferry doctor configs/sim-2p2d.yaml`."""
    dependencies = Path(pytest.__file__).parents[1]  # on PYTHONPATH no .pth file is read: the sources stay out
    command = [installed, "-m", "kvferry", "doctor", "configs/sim-2p2d.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(dependencies)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60)
    first = done.stdout.splitlines()[0]
    assert first.startswith("ok    config") and str(installed.parents[1]) in first, done.stdout + done.stderr
