"""The wheel holds our packages and nothing else, and no other distribution claims our top-level names."""

import json
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
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
        if name and (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
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


def test_each_top_level_package_says_that_it_is_typed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{package.split('.')[0]}/py.typed" for package in PACKAGES} <= names


def test_our_names_belong_to_us_alone(wheel, tmp_path):
    """In a venv that sees our dependencies, each of our import names comes from exactly one distribution."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            site.stdout.strip(),
            str(wheel),
        ],
        check=True,
        timeout=60,
    )
    code = "import json, importlib.metadata as m; print(json.dumps(dict(m.packages_distributions())))"
    alone = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    owners = json.loads(alone.stdout)
    ours = {name.split(".")[0] for name in PACKAGES}
    assert {name for name, dists in owners.items() if "kvferry" in dists} == ours
    here = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    clashes = {n: d for n, d in json.loads(here.stdout).items() if n in ours and set(d) != {"kvferry"}}
    assert not clashes, clashes
