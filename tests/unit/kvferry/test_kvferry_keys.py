"""`kvferry keys`: what it writes, what it refuses, and that nothing of a key is left but where it was asked."""

import json
import os
import stat
from pathlib import Path

import pytest

from kvcore.config.file import load_config
from kvcore.config.security import KeysConfig
from kvcore.errors import ConfigError
from kvcore.tenants.keys import TenantLimits, parse_keys
from kvcore.tenants.source import KeySource
from kvferry.cli import main
from kvferry.secret import run_new

CLUSTER = """
cluster: c
model: {path: sim, name: sim}
engine: {kind: sim, bytes_per_token: 64}
nodes: {d: {role: decoder, port: 7001}}
security: {secret: {file: secret}, keys: {file: keys.json}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["keys", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_key_is_printed_once_and_holds(capsys, file):
    code, out, err = run(capsys, "create", "acme", "--file", str(file), "--concurrency", "3")
    key = out.strip()
    assert code == 0 and key.startswith("kvf_") and key not in err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    source = KeySource(KeysConfig(file=str(file)))
    record = source.ring.find(key)
    assert record is not None and (record.tenant, record.admin) == ("acme", False)
    assert source.ring.limits("acme") == TenantLimits(concurrency=3)
    secret = key.split("_", 2)[2]
    assert not [path for path in file.parent.iterdir() if secret in path.read_text()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_files_that_root_changes_stay_their_owners_who_could_not_read_them_else(capsys, file, tmp_path):
    """A router that cannot read the file of keys any more goes on with those of before, revoked ones too."""
    secret = tmp_path / "secret"
    key = run(capsys, "create", "acme", "--file", str(file))[1]
    run_new(secret, rotate=False)
    for path in (secret, file):
        os.chown(path, 12_345, 23_456)
        path.chmod(0o640)
    run_new(secret, rotate=True)
    assert run(capsys, "revoke", key[4:16], "--file", str(file))[0] == 0
    for path in (secret, file):
        found = path.stat()
        assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (12_345, 23_456, 0o640)


def test_limits_are_the_tenants_and_what_is_not_given_again_stays(capsys, file):
    for words in (["--tokens-per-minute", "50"], ["--priority", "low"], []):
        assert run(capsys, "create", "acme", "--file", str(file), *words)[0] == 0
    assert parse_keys(file.read_bytes()).tenants == {"acme": TenantLimits(tokens_per_minute=50, priority="low")}


def test_list_shows_whose_keys_there_are_and_no_hash(capsys, file):
    key = run(capsys, "create", "acme", "--admin", "--file", str(file))[1].strip()
    table = run(capsys, "list", "--file", str(file))[1]
    assert key[4:16] in table and "acme" in table and "yes" in table
    listed = json.loads(run(capsys, "list", "--json", "--file", str(file))[1])
    assert listed["keys"][0]["id"] == key[4:16] and "sha256" not in listed["keys"][0]


def test_a_revoked_key_holds_no_longer_and_another_one_does(capsys, file):
    first, second = (run(capsys, "create", "acme", "--file", str(file))[1].strip() for _ in range(2))
    code, out, _ = run(capsys, "revoke", first[4:16], "--file", str(file))
    assert code == 0 and "acme" in out
    ring = KeySource(KeysConfig(file=str(file))).ring
    assert ring.find(first) is None and ring.find(second) is not None
    assert run(capsys, "revoke", first[4:16], "--file", str(file))[0] == 0
    code, _, err = run(capsys, "revoke", "0" * 12, "--file", str(file))
    assert code == 2 and "has no key 000000000000" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["create", "a b"], "no name of a tenant"),
        (["create", "a", "--concurrency", "0"], "concurrency"),
        (["create", "a", "--requests-per-minute", "1" + "0" * 400], "requests_per_minute"),
        (["create", "a", "--cache-share", "nan"], "cache_share"),
        (["revoke", "x"], "cannot be read"),
        (["list"], "cannot be read"),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_written(capsys, file, words, said):
    code, _, err = run(capsys, *words, "--file", str(file))
    assert code == 2 and said in err and not file.exists()


@pytest.mark.parametrize("seconds", ["inf", "1e400", "nan", "0"])
def test_a_first_token_has_a_time_that_ends(capsys, file, seconds):
    """No end was written down as `null`: what the cluster file says, and not what was asked for."""
    with pytest.raises(SystemExit):
        main(["keys", "create", "a", "--file", str(file), "--first-token-s", seconds])
    assert f"--first-token-s: {seconds!r} is no time" in capsys.readouterr().err and not file.exists()


def test_a_file_that_is_none_is_left_as_it_is(capsys, file):
    file.write_text("{")
    code, _, err = run(capsys, "create", "a", "--file", str(file))
    assert code == 2 and "not a file of keys" in err and file.read_text() == "{"


def test_the_cluster_file_says_where_the_keys_are(capsys, tmp_path):
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    key = run(capsys, "create", "a", "--config", str(tmp_path / "cluster.yaml"))[1].strip()
    config = load_config(tmp_path / "cluster.yaml")
    assert config.security.keys is not None and config.security.keys.file == str(tmp_path / "keys.json")
    assert KeySource(config.security.keys).ring.find(key) is not None
    assert run(capsys, "list")[0] == 2


@pytest.mark.parametrize(
    ("security", "said"),
    [
        ("{keys: {file: keys.json}}", "set security.secret too"),
        ("{secret: {file: s}, keys: {}}", "give one of file and env"),
        ("{secret: {file: s}, keys: {file: k, env: K}}", "give one of file and env"),
    ],
)
def test_keys_that_cannot_be_used_are_told_by_the_check_of_the_file(tmp_path, security, said):
    (tmp_path / "cluster.yaml").write_text(CLUSTER.rpartition("security")[0] + f"security: {security}\n")
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "cluster.yaml")
