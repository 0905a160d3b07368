"""The cluster's secret: what is one, where it is read, how it is changed, and that nothing shows it."""

import base64
import hmac
import logging
import random
import threading
from pathlib import Path

import msgspec
import pytest

from kvcore.clock import ManualClock
from kvcore.config.file import load_config
from kvcore.config.security import SecretConfig
from kvcore.errors import ConfigError
from kvcore.trust.keys import ClusterKey, KeyLabel
from kvcore.trust.secret_text import BadSecretError, new_secret, parse_secrets
from kvcore.trust.secrets import Secrets, open_secrets
from kvferry.cli import main

ROOT = Path(__file__).resolve().parents[3]
_DRAWN = random.Random(7)  # of a fixed seed: names of tests must be the same in each of pytest's processes
OLD, NEW = _DRAWN.randbytes(32), _DRAWN.randbytes(40)


def text_of(*secrets: bytes) -> str:
    return "".join(base64.b64encode(secret).decode() + "\n" for secret in secrets)


def write(path: Path, text: str, mode: int = 0o600) -> SecretConfig:
    path.write_text(text)
    path.chmod(mode)
    return SecretConfig(file=str(path))


def refusal(config: SecretConfig) -> str:
    with pytest.raises(ConfigError) as raised:
        open_secrets(config)
    return raised.value.message


def test_hex_and_both_base64s_are_read_and_comments_skipped():
    urlsafe = base64.urlsafe_b64encode(NEW).decode().rstrip("=")
    assert parse_secrets(f"# ours\n\n  {OLD.hex()}  \n{urlsafe}\n") == (OLD, NEW)
    assert parse_secrets(text_of(NEW)) == (NEW,)
    assert len(parse_secrets(new_secret())[0]) == 32


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("correct horse battery staple", "line 1 is neither hex nor base64"),
        ("hunter2hunter2", "10 bytes; a secret has 32 or more"),
        ("00" * 64, "not drawn at random"),
        ("deadbeef" * 16, "not drawn at random"),
        (text_of(OLD, NEW, OLD[::-1]), "3 secrets; 2 at most"),
        (text_of(OLD, OLD), "the same secret twice"),
        ("a" * 5000, "longer than 4096"),
    ],
)
def test_what_is_no_secret_is_refused_and_not_shown(text, says):
    with pytest.raises(BadSecretError, match=says) as raised:
        parse_secrets(text)
    assert not text or text not in str(raised.value)


def test_keys_differ_by_secret_label_and_context_and_are_32_bytes():
    first, second = ClusterKey(OLD), ClusterKey(NEW)
    made = {key.derive(label, context) for key in (first, second) for label in KeyLabel for context in (b"", b"a")}
    assert len(made) == 2 * len(KeyLabel) * 2
    assert {len(key) for key in made} == {32}
    assert first.id != second.id
    assert ClusterKey(OLD).derive(KeyLabel.CHUNKS, b"t") == first.derive(KeyLabel.CHUNKS, b"t")


def test_a_known_key_stays_what_it_is():
    """Chunks that lie in tiers are read with it by later versions."""
    key = ClusterKey(bytes(range(32)))
    assert key.id.hex() == "9c8a87ab82a9fbfe"
    expected = "4d332d89b4f771f5952e7619c3851c036b23a2729099a4db883b0db068251afd"
    assert key.derive(KeyLabel.CHUNKS, b"tenant").hex() == expected


def test_the_first_signs_and_both_are_accepted():
    held = Secrets((NEW, OLD))
    assert held.derive(KeyLabel.HTTP) == ClusterKey(NEW).derive(KeyLabel.HTTP)
    assert held.derive_all(KeyLabel.HTTP) == tuple(ClusterKey(s).derive(KeyLabel.HTTP) for s in (NEW, OLD))
    assert held.find(ClusterKey(OLD).id) is held.accepted[1]
    assert held.find(b"other") is None


def test_a_file_is_read_again_when_it_changes_and_only_then(tmp_path):
    path = tmp_path / "secret"
    held = open_secrets(write(path, text_of(OLD)))
    assert held is not None
    before = held.newest
    assert not held.refresh()
    write(path, text_of(NEW, OLD))
    assert held.refresh()
    assert not held.refresh()
    assert [key.id for key in held.accepted] == [ClusterKey(NEW).id, ClusterKey(OLD).id]
    assert held.accepted[1] is before


def test_a_file_that_turns_bad_changes_nothing_and_is_said_once(tmp_path, caplog):
    path = tmp_path / "secret"
    held = open_secrets(write(path, text_of(OLD)))
    write(path, "half a sec")
    with caplog.at_level(logging.INFO):
        assert not held.refresh()
        assert not held.refresh()
    assert caplog.text.count("secret_not_reloaded") == 1
    assert held.newest.id == ClusterKey(OLD).id
    write(path, text_of(NEW), mode=0o644)
    assert not held.refresh()
    assert held.newest.id == ClusterKey(OLD).id
    path.chmod(0o600)
    assert held.refresh() and held.newest.id == ClusterKey(NEW).id, "as the line in the log has said"


def test_a_file_that_is_away_is_said_once(tmp_path, caplog):
    path = tmp_path / "secret"
    held = open_secrets(write(path, text_of(OLD)))
    for _ in range(2):
        path.unlink()
        for _ in range(3):
            assert not held.refresh()
        write(path, text_of(OLD))
        held.refresh()
    assert caplog.text.count("secret_not_reloaded") == 2


@pytest.mark.parametrize("mode", [0o604, 0o620, 0o666, 0o601])
def test_a_file_that_others_can_get_at_is_refused(tmp_path, mode):
    assert f"mode {mode:04o}" in refusal(write(tmp_path / "secret", text_of(OLD), mode))


def test_its_group_may_read_it(tmp_path):
    assert open_secrets(write(tmp_path / "secret", text_of(OLD), 0o640)) is not None


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path):
    assert "no such file" in refusal(SecretConfig(file=str(tmp_path / "none")))
    assert "cannot be read" in refusal(SecretConfig(file=str(tmp_path)))
    (tmp_path / "bytes").write_bytes(b"\xff" * 64)
    (tmp_path / "bytes").chmod(0o600)
    assert "not a text" in refusal(SecretConfig(file=str(tmp_path / "bytes")))


def finish_commands() -> None:
    for thread in threading.enumerate():
        if thread.name == "secret's command":
            thread.join(60)


def test_a_command_is_run_again_beside_other_work_and_one_that_fails_changes_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    clock, file = ManualClock(), tmp_path / "printed"
    file.write_text(text_of(OLD))
    secrets = open_secrets(SecretConfig(command=["cat", str(file)], every_s=60.0), clock)
    assert secrets is not None

    def after(seconds: float) -> list[bytes]:
        clock.advance(seconds)
        assert secrets.accepted
        finish_commands()
        clock.advance(1.0)
        return [key.id for key in secrets.accepted]

    old, new = ClusterKey(OLD).id, ClusterKey(NEW).id
    file.write_text(text_of(NEW, OLD))
    assert after(30.0) == [old], "it is not time yet"
    assert after(30.0) == [new, old]
    assert after(61.0) == [new, old]
    assert caplog.text.count("secret_reloaded") == 1, "the same is no news"
    file.unlink()
    assert after(61.0) == [new, old] and caplog.text.count("secret_not_reloaded") == 1
    file.write_text(text_of(NEW))
    assert after(61.0) == [new]


def test_only_a_command_is_run_again():
    with pytest.raises(ConfigError, match=r"security\.secret\.every_s: it is for a command"):
        load_config(ROOT / "configs/sim-2p2d.yaml", ["security.secret={env: X, every_s: 5}"])


def test_the_environment_and_a_command_give_it(monkeypatch):
    monkeypatch.setenv("THE_SECRET", text_of(OLD))
    assert open_secrets(SecretConfig(env="THE_SECRET")).newest.id == ClusterKey(OLD).id
    assert open_secrets(SecretConfig(command=["printenv", "THE_SECRET"])).newest.id == ClusterKey(OLD).id
    assert "no environment variable NOT_THERE" in refusal(SecretConfig(env="NOT_THERE"))
    assert "ended with 1" in refusal(SecretConfig(command=["printenv", "NOT_THERE"]))
    assert "cannot be run" in refusal(SecretConfig(command=["/no/such/program"]))
    assert "is empty" in refusal(SecretConfig(command=["true"]))
    assert open_secrets(None) is None


def test_nothing_shows_a_secret(tmp_path, caplog):
    path = tmp_path / "secret"
    with caplog.at_level(logging.DEBUG):
        held = open_secrets(write(path, text_of(OLD)))
        write(path, text_of(NEW, OLD))
        held.refresh()
    shown = repr(held) + repr(held.newest) + repr(held.accepted) + caplog.text
    for secret in (OLD, NEW):
        assert secret.hex() not in shown
        assert base64.b64encode(secret).decode() not in shown
    assert held.newest.id.hex() in shown


SIM = ROOT / "configs/sim-2p2d.yaml"


def test_the_cluster_file_says_where_it_is(tmp_path):
    text = SIM.read_text() + "\nsecurity: {secret: {file: keys/secret}}\n"
    (tmp_path / "cluster.yaml").write_text(text)
    assert load_config(tmp_path / "cluster.yaml").security.secret.file == str(tmp_path / "keys/secret")
    assert load_config(SIM).security.secret is None


@pytest.mark.parametrize("said", ["{}", "{file: a, env: b}"])
def test_one_place_must_be_given(said):
    with pytest.raises(ConfigError, match=r"security\.secret: give one of file, env and command"):
        load_config(SIM, [f"security.secret={said}"])


@pytest.mark.parametrize("where", ["security", "security.secret", "security.secret.value", "security.secret.file.deep"])
def test_a_secret_in_the_cluster_file_itself_is_refused_and_not_shown(where):
    secret = new_secret()
    with pytest.raises(ConfigError) as raised:
        load_config(SIM, ["security.secret.file=x", f"{where}={secret}"])
    assert secret not in raised.value.message
    assert "security" in raised.value.message


def test_kvferry_secret_new_writes_a_file_for_its_owner_alone(tmp_path, capsys):
    path = tmp_path / "secret"
    assert main(["secret", "new", str(path)]) == 0
    assert path.stat().st_mode & 0o777 == 0o600
    first = path.read_text().strip()
    assert open_secrets(SecretConfig(file=str(path))) is not None
    assert main(["secret", "new", str(path)]) == 2
    assert path.read_text().strip() == first
    assert main(["secret", "new", "--rotate", str(path)]) == 0
    newest, before = path.read_text().split()
    assert (before, newest != first) == (first, True)
    assert main(["secret", "new", "--rotate", str(path)]) == 0
    assert path.read_text().split()[1] == newest
    assert [file.name for file in tmp_path.iterdir()] == ["secret"]
    said = "".join(capsys.readouterr())
    assert first not in said and newest not in said


def test_rotating_what_is_no_secret_is_refused(tmp_path, capsys):
    path = tmp_path / "secret"
    path.write_text("hunter2")
    assert main(["secret", "new", "--rotate", str(path)]) == 2
    assert "holds no secret" in capsys.readouterr().err
    assert path.read_text() == "hunter2"


def test_a_config_with_a_secret_says_nothing_of_it(tmp_path):
    config = load_config(SIM, ["security.secret.env=SOME_NAME"])
    shown = {"file": None, "env": "SOME_NAME", "command": None, "every_s": None}
    assert msgspec.to_builtins(config.security.secret) == shown


@pytest.mark.parametrize("length", [0, 1, 55, 56, 64, 200, 100_000])
def test_a_mac_key_makes_what_the_library_makes(length):
    held, message = ClusterKey(OLD), random.randbytes(length)
    key, mac = held.derive(KeyLabel.HTTP, b"c"), held.mac_key(KeyLabel.HTTP, b"c")
    assert mac is held.mac_key(KeyLabel.HTTP, b"c")
    for _ in range(2):
        assert mac.digest(message) == hmac.digest(key, message, "sha256")
    assert held.mac_key(KeyLabel.HTTP, b"d").digest(message) != mac.digest(message)
    assert key.hex() not in repr(mac)
