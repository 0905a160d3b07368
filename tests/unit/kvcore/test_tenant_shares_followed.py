"""The cache shares of tenants, as machines that hold caches follow them."""

import asyncio
from pathlib import Path

import msgspec
from support.cluster import write_config
from support.metadata_rigs import end, until

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.tenants.keys import KeyFile, TenantLimits
from kvcore.tenants.salts import salts_by
from kvcore.tenants.shares import FollowedShares
from kvcore.trust.secrets import Secrets

OLD, NEW = bytes(range(32)), bytes(range(32, 64))


def config_in(folder: Path) -> ClusterConfig:
    overrides = [f"security.keys.file={folder}/keys.json", "security.secret.env=S", "store.tenant_share=0.5"]
    return load_config(write_config(folder), overrides)


def write(folder: Path, **shares: float | None) -> None:
    tenants = {name: TenantLimits(cache_share=share) for name, share in shares.items()}
    (folder / "keys.json").write_bytes(msgspec.json.encode(KeyFile(tenants=tenants)))


async def test_they_are_those_of_the_file_under_each_secret_and_follow_it(tmp_path):
    write(tmp_path, a=0.25, b=None)
    secrets = Secrets((NEW, OLD))
    followed = FollowedShares(config_in(tmp_path), secrets)
    for key in secrets.accepted:
        assert followed.shares.of(salts_by(key)("a").owner) == 0.25
        assert followed.shares.of(salts_by(key)("b").owner) == 0.5
    assert len(followed.shares.own) == 2
    assert salts_by(secrets)("a").owner == salts_by(secrets.newest)("a").owner
    shares, task = followed.shares, asyncio.create_task(followed.follow(0.001))
    write(tmp_path, a=0.125, bb=0.75)
    await until(lambda: shares.of(salts_by(secrets)("bb").owner) == 0.75)
    assert shares.of(salts_by(secrets)("a").owner) == 0.125
    await end(task)


async def test_a_machine_without_the_file_says_so_and_holds_to_the_cluster_files_share(tmp_path, caplog):
    followed = FollowedShares(config_in(tmp_path), Secrets((NEW,)))
    assert followed.shares.limited and followed.shares.default == 0.5 and not followed.shares.own
    assert "no_keys_here" in caplog.text
    await followed.follow()


async def test_without_keys_nothing_is_looked_for(tmp_path):
    followed = FollowedShares(load_config(write_config(tmp_path)), None)
    assert not followed.shares.limited
    await followed.follow()
