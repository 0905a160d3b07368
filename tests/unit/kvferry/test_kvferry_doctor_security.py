"""What the doctor says of the files by which a cluster's processes and tenants are known."""

import os
from pathlib import Path

import pytest
from support.certificates import cluster_certificates, tls_section

from kvcore.config.file import load_config
from kvcore.errors import ConfigError
from kvcore.tenants.source import KeySource
from kvferry.cli import main
from kvferry.doctor.findings import Context, Finding
from kvferry.doctor.security import check_security
from kvferry.secret import run_new

SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"


def found(*overrides: str) -> list[Finding]:
    return check_security(Context(load_config(SIM, overrides), all_here=True))


def test_good_certificates_and_the_first_that_ends(tmp_path):
    authority = cluster_certificates(tmp_path)
    authority.issue(tmp_path, "decode-0", days=40)
    no_secret, good = found(f"security.tls={tls_section(tmp_path)}")
    assert no_secret.ok and "no secret" in no_secret.detail
    assert good.ok and "decode-0's ends first" in good.detail and "metadata-server" in good.detail


def test_certificates_that_end_soon_are_missing_elsewhere_or_not_the_nodes(tmp_path):
    authority = cluster_certificates(tmp_path)
    authority.issue(tmp_path, "prefill-0", days=10, age_days=60)
    authority.issue(tmp_path, "prefill-1", ["192.0.2.1"])
    (tmp_path / "decode-0.key").write_bytes(b"")
    for kind in ("pem", "key"):
        (tmp_path / f"decode-1.{kind}").write_bytes((tmp_path / f"router.{kind}").read_bytes())
    nodes = "security.nodes=[prefill-0, prefill-1, decode-0, decode-1]"
    bad = {line.subject: line for line in found(f"security.tls={tls_section(tmp_path)}", nodes) if not line.ok}
    assert set(bad) == {f"security of {name}" for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")}
    assert "ends" in bad["security of prefill-0"].detail and "renew" in bad["security of prefill-0"].remedy
    assert "127.0.0.1" in bad["security of prefill-1"].detail
    assert "no certificate with its key" in bad["security of decode-0"].detail
    assert "has not the name decode-1" in bad["security of decode-1"].detail


def test_a_certificate_of_a_day_ends_soon_in_its_last_fifth(tmp_path):
    authority = cluster_certificates(tmp_path)
    authority.issue(tmp_path, "client", days=1)
    assert all(line.ok for line in found(f"security.tls={tls_section(tmp_path)}"))
    authority.issue(tmp_path, "client", days=0.1, age_days=0.9)
    (bad,) = [line for line in found(f"security.tls={tls_section(tmp_path)}") if not line.ok]
    assert bad.subject == "security of client"


def test_the_key_of_the_routers_certificate_is_the_routers_alone(tmp_path):
    cluster_certificates(tmp_path).issue(tmp_path, "site", days=3, age_days=87)
    cert, key = tmp_path / "site.pem", tmp_path / "site.key"
    key.chmod(0o644)
    mode, soon = found(f"router.tls={{cert: {cert}, key: {key}}}")
    assert "mode 0644" in mode.detail and "ends" in soon.detail


def test_the_file_of_keys_is_read_and_whose_it_is(tmp_path, monkeypatch, capsys):
    secret, keys = tmp_path / "secret", tmp_path / "keys.json"
    run_new(secret, rotate=False)
    config = (f"security.secret.file={secret}", f"security.keys.file={keys}")
    assert main(["keys", "create", "acme", "--file", str(keys)]) == 0
    _, line = found(*config)
    assert line.ok and "1 of 1 tenants; none is an admin's" in line.detail
    keys.chmod(0o666)
    _, line = found(*config)
    assert not line.ok and "lets others add keys" in line.detail
    keys.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: keys.stat().st_uid + 1)
    wanted = load_config(SIM, config).security.keys
    if keys.stat().st_uid != 0:
        with pytest.raises(ConfigError, match="it belongs to user"):
            KeySource(wanted)
    monkeypatch.undo()
    keys.write_text("{")
    _, line = found(*config)
    assert not line.ok and "keys create" in line.detail


def test_the_command_makes_certificates_that_the_cluster_can_use(tmp_path, capsys):
    assert main(["secret", "certs", str(tmp_path / "certs"), "--config", str(SIM), "--days", "30"]) == 0
    section = capsys.readouterr().out.splitlines()[-1].removeprefix("security.tls: ")
    ca = (tmp_path / "certs" / "ca.pem").read_bytes()
    assert all(line.ok for line in found(f"security.tls={section}"))
    assert main(["secret", "certs", str(tmp_path / "certs"), "--config", str(SIM)]) == 0
    assert (tmp_path / "certs" / "ca.pem").read_bytes() == ca, "renewed from the same CA"
    assert all(line.ok for line in found(f"security.tls={section}"))
    assert oct((tmp_path / "certs" / "ca.key").stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize("days", ["inf", "nan", "1e9", "0", "-5", "a year"])
def test_days_that_no_certificate_holds_are_refused(tmp_path, capsys, days):
    with pytest.raises(SystemExit):
        main(["secret", "certs", str(tmp_path / "certs"), "--config", str(SIM), f"--days={days}"])
    assert f"--days: {days!r} is no number of days" in capsys.readouterr().err and not (tmp_path / "certs").exists()
