"""The doctor says what a codec needs, when it pays, and what MACs cost."""

import msgspec

from kvcore.config.kv.settings import KVConfig
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, TorchEngineConfig
from kvcore.config.security import SecretConfig, SecurityConfig
from kvcore.config.tiers import DiskTierConfig, RedisTierConfig, TiersConfig
from kvcore.types import Role
from kvferry.doctor import codecs
from kvferry.doctor.checks import ALL_CHECKS
from kvferry.doctor.codecs import check_codecs, check_proofs
from kvferry.doctor.findings import Context
from kvstore.integrity.measure import ProofRates, measure_proofs

CONFIG = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="m", name="m"),
    engine=TorchEngineConfig(),
    nodes={
        "d0": NodeConfig(
            role=Role.DECODER, host="127.0.0.1", port=8712, disk=DiskTierConfig(path="/d", size=1, codec="lossless")
        )
    },
    tiers=TiersConfig(redis=RedisTierConfig(url="redis://r", codec="int8"), disk=DiskTierConfig(path="/d", size=1)),
)


def test_each_codec_is_named_with_when_it_pays():
    redis, disk = check_codecs(Context(CONFIG))
    assert redis.ok and redis.subject == "tiers.redis.codec" and "int8 is lossy" in redis.detail
    assert disk.ok and disk.subject == "nodes.d0.disk.codec" and "0.5 GB/s" in disk.detail
    plain = msgspec.structs.replace(CONFIG, tiers=TiersConfig(), nodes={})
    assert check_codecs(Context(plain)) == [] and check_codecs in ALL_CHECKS


def test_what_is_not_installed_is_said(monkeypatch):
    monkeypatch.setattr(codecs, "find_spec", lambda _: None)
    _, disk = check_codecs(Context(CONFIG))
    assert not disk.ok and disk.remedy == "pip install 'kvferry[codec]'"


def test_what_macs_cost_here_is_said_where_there_are_macs():
    secured = msgspec.structs.replace(CONFIG, security=SecurityConfig(secret=SecretConfig(env="S")))
    fast, slow = ProofRates(24.7e9, 60e9, 14.3e9), ProofRates(1.2e9, 20e9, 1e9)
    (found,) = check_proofs(Context(secured), lambda: fast)
    assert found.ok and found.detail == "mac: 24.7 GB/s a thread here, where a checksum goes at 60.0"
    (found,) = check_proofs(Context(secured), lambda: slow)
    assert found.ok and "slow" in found.detail and "`kv.verify: checksum`" in found.detail
    assert check_proofs(Context(CONFIG)) == [] and check_proofs in ALL_CHECKS
    encrypted = msgspec.structs.replace(secured, kv=KVConfig(encrypt=True))
    _, found = check_proofs(Context(encrypted), lambda: fast)
    assert (found.subject, found.ok, found.detail) == ("kv.encrypt", True, "14.3 GB/s a thread here, on each end")
    plain = msgspec.structs.replace(secured, kv=KVConfig(verify="checksum"))
    assert check_proofs(Context(plain)) == []
    measured = measure_proofs(1 << 16, 1)
    assert measured.mac > 0 and measured.checksum > 0 and measured.encrypt > 0
