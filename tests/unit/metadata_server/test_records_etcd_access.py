"""What a cluster file may say of etcd, and what is refused with the setting that is wrong."""

import importlib.util

import pytest

from kvcore.config.parse import InvalidValueError, parse
from kvcore.config.records import EtcdRecordsConfig
from kvcore.errors import ConfigError
from metadata_server.records.etcd.access import PASSWORD, etcd_access


@pytest.fixture(autouse=True)
def _installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def access(environ: dict[str, str] | None = None, **section: object):
    config = parse({"endpoints": ["http://a:2379"], **section}, EtcdRecordsConfig)
    return etcd_access(config, "c", environ or {})


def test_endpoints_prefix_and_files_are_read(tmp_path):
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text(name.upper())
    files = {name: str(tmp_path / name) for name in ("ca", "cert", "key")}
    found = access(endpoints=["https://a:2379", "https://[::1]:2379/"], prefix="team/", **files)
    assert found.hosts == ("a:2379", "[::1]:2379") and found.prefix == "team/c/"
    assert (found.ca, found.cert, found.key) == (b"CA", b"CERT", b"KEY")
    assert access().ca is None


def test_the_password_is_in_the_environment_or_a_file_and_is_never_shown(tmp_path):
    (tmp_path / "word").write_text("secret\nmore")
    (tmp_path / "key").write_text("private")
    for found in (access({PASSWORD: "secret"}, user="kv"), access(user="kv", password_file=str(tmp_path / "word"))):
        assert (found.user, found.password) == ("kv", "secret") and "secret" not in repr(found)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"endpoints": ["a:2379"]}, "expected http://HOST:PORT"),
        ({"endpoints": ["http://a"]}, "expected http://HOST:PORT"),
        ({"endpoints": ["http://a:no"]}, "expected http://HOST:PORT"),
        ({"endpoints": ["http://kv:word@a:2379"]}, "expected http://HOST:PORT"),
        ({"endpoints": ["http://a:2379/v3"]}, "expected http://HOST:PORT"),
        ({"endpoints": ["http://a:1", "https://b:1"], "ca": "x"}, "mixed"),
        ({"endpoints": ["https://a:1"]}, "records.ca: missing"),
        ({"ca": "x"}, "take it out"),
        ({"cert": "x", "key": "y"}, "records.cert"),
        ({"endpoints": ["https://a:1"], "ca": "/nowhere/ca.pem"}, "/nowhere/ca.pem cannot be read"),
        ({"user": "kv"}, PASSWORD),
        ({"password_file": "x"}, "goes with a user"),
    ],
)
def test_what_cannot_be_is_refused(section, said):
    with pytest.raises(ConfigError, match=said):
        access(**section)


def test_there_is_at_least_one_endpoint():
    with pytest.raises(InvalidValueError, match="endpoints"):
        access(endpoints=[])


def test_without_the_library_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[etcd\]'"):
        access()
