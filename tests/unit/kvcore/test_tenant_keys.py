"""The file of API keys: what it holds, what it does not, and how a key is found in it."""

import hmac
import json
from collections.abc import Callable
from hashlib import sha256

import msgspec
import pytest

from kvcore.config.security import KeysConfig
from kvcore.errors import ConfigError
from kvcore.tenants.keys import BadKeyFileError, KeyFile, KeyRing, new_key, parse_keys
from kvcore.tenants.source import KeySource


def test_a_file_that_is_none_changes_nothing_and_is_said_once(tmp_path, caplog):
    path, records = tmp_path / "keys.json", [new_key(name, admin=False, created="")[1] for name in "abc"]
    path.write_bytes(msgspec.json.encode(KeyFile(keys=records)))
    source = KeySource(KeysConfig(file=str(path)))
    path.write_text('{"version": 1, "keys": [{"id": "zz"}]}')
    assert not source.refresh() and not source.refresh()
    path.unlink()
    assert not source.refresh()
    path.write_bytes(b"\xff")
    path.chmod(0o666)
    assert not source.refresh()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3
    assert "$.keys[0].id" in said[0] and "no such file" in said[1] and "lets others add keys" in said[2]
    assert len(source.ring) == 3
    path.chmod(0o600)
    path.write_bytes(msgspec.json.encode(KeyFile(keys=records[:1])))
    assert source.refresh() and len(source.ring) == 1


def test_keys_come_from_the_environment_too(monkeypatch):
    key, record = new_key("a", admin=False, created="")
    monkeypatch.setenv("MY_KEYS", json.dumps({"keys": [msgspec.to_builtins(record)]}))
    source = KeySource(KeysConfig(env="MY_KEYS"))
    assert source.ring.find(key) == record and not source.refresh()
    with pytest.raises(ConfigError, match="no environment variable OTHER_KEYS"):
        KeySource(KeysConfig(env="OTHER_KEYS"))


def test_no_key_can_be_read_from_the_file_or_from_what_is_said_of_it(tmp_path):
    key, record = new_key("a", admin=False, created="")
    secret = key.split("_", 2)[2]
    raw = msgspec.json.encode(KeyFile(keys=[record])).decode()
    assert secret not in raw and record.sha256 == sha256(key.encode()).hexdigest()
    ring = KeyRing(parse_keys(raw))
    assert secret not in repr(ring) and record.sha256 not in repr(ring)
    with pytest.raises(BadKeyFileError) as caught:
        parse_keys(raw.replace('"tenant":"a"', f'"tenant":"{key}!"'))
    assert secret not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        *("", "[]", "null", "[" * 5000, '{"version": 2}', '{"keys": 3}', '{"more": 1}', '{"tenants": {"a b": {}}}'),
        *('{"tenants": {"a": {"concurrency": 0}}}', '{"tenants": {"a": {"priority": "urgent"}}}'),
    ],
)
def test_what_is_no_file_of_keys_is_refused(raw):
    with pytest.raises(BadKeyFileError):
        parse_keys(raw)


def test_two_keys_of_one_id_are_refused():
    _, record = new_key("a", admin=False, created="")
    raw = msgspec.json.encode(KeyFile(keys=[record, msgspec.structs.replace(record, tenant="b")]))
    with pytest.raises(BadKeyFileError, match="same id"):
        parse_keys(raw)


def test_a_key_is_compared_as_a_whole_whoever_it_seems_to_be(monkeypatch):
    """How long a wrong key takes does not depend on what of it is right: each is hashed and compared once."""
    made = [new_key(f"t{n}", admin=False, created="") for n in range(3)]
    ring, compared = KeyRing(KeyFile(keys=[record for _, record in made])), list[tuple[int, int]]()
    real: Callable[[bytes, bytes], bool] = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: (compared.append((len(a), len(b))), real(a, b))[1])
    key = made[0][0]
    near = key[:-1] + ("A" if key[-1] != "A" else "B")
    wrong = [near, "kvf_" + "0" * 12 + key[16:], "x", "", key + "x", "\udcff" * 9]
    assert [ring.find(one) for one in (key, *wrong)] == [made[0][1], *[None] * 6]
    assert compared == [(32, 32)] * 7
    assert ring.find("x" * 10_000_000) is None and len(compared) == 7
