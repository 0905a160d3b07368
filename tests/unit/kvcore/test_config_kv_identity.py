"""What a cluster file declares of its KV: a lossy codec, wherever in it, and encryption make it another kind."""

import msgspec
import pytest

from kvcore.config.kv.settings import KVConfig
from kvcore.config.kv_identity import declared_kv
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, TorchEngineConfig
from kvcore.config.tiers import DiskTierConfig, ObjectTierConfig, RedisTierConfig, TiersConfig
from kvcore.types import Role

CONFIG = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="m", name="m"),
    engine=TorchEngineConfig(),
    nodes={"d0": NodeConfig(role=Role.DECODER, host="127.0.0.1", port=8712)},
)


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_what_loses_nothing_is_the_same_kv(codec):
    disk = DiskTierConfig(path="/d", size=1, codec=codec)
    config = msgspec.structs.replace(CONFIG, tiers=TiersConfig(disk=disk))
    assert declared_kv(CONFIG) == declared_kv(config) == ()


def test_int8_in_any_tier_of_any_node_is_declared_once_and_encryption_is_too():
    lossy = [
        TiersConfig(disk=DiskTierConfig(path="/d", size=1, codec="int8")),
        TiersConfig(redis=RedisTierConfig(url="redis://r", codec="int8"), disk=DiskTierConfig(path="/d", size=1)),
        TiersConfig(object=ObjectTierConfig(url="s3://b", codec="int8"), redis=RedisTierConfig(url="r", codec="int8")),
    ]
    for tiers in lossy:
        assert declared_kv(msgspec.structs.replace(CONFIG, tiers=tiers)) == (("tiers.codec", "int8.v1"),)
    encrypted = msgspec.structs.replace(CONFIG, kv=KVConfig(encrypt=True))
    assert declared_kv(encrypted) == (("kv.encrypt", "aes-256-gcm.v1"),)
    own = msgspec.structs.replace(CONFIG.nodes["d0"], disk=DiskTierConfig(path="/d", size=1, codec="int8"))
    assert declared_kv(msgspec.structs.replace(CONFIG, nodes={"d0": own})) == (("tiers.codec", "int8.v1"),)
