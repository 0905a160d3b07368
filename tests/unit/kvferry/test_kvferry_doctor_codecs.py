"""The doctor says what a codec needs, and when it pays."""

import msgspec

from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, TorchEngineConfig
from kvcore.config.tiers import DiskTierConfig, RedisTierConfig, TiersConfig
from kvcore.types import Role
from kvferry.doctor import codecs
from kvferry.doctor.checks import ALL_CHECKS
from kvferry.doctor.codecs import check_codecs
from kvferry.doctor.findings import Context

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
