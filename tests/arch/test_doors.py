"""Every module of a package with doors is one that outsiders may import or one that its contract protects."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "metadata_server": {"client", "connect", "messages", "cache_messages", "account_messages"},
    "kvstore": {
        *("store", "types", "settings", "wiring", "put_session", "placement", "manifest", "chunk_format"),
        "codecs",
        "integrity",
        "tiers",
    },
}


@pytest.mark.parametrize("package", PUBLIC)
def test_a_new_module_is_public_or_protected(package: str) -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["type"] == "protected" and c["allowed_importers"] == [package])
    protected = {name.removeprefix(f"{package}.") for name in contract["protected_modules"]}
    found = [path for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    modules = {path.stem for path in found}
    assert modules - {"__init__"} == protected | PUBLIC[package]
    assert not protected & PUBLIC[package]
