"""Cluster files of tests that are about the metadata servers in them."""

from pathlib import Path
from typing import Any

import yaml

from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig


def config_with(folder: Path, **server: Any) -> ClusterConfig:
    """A cluster's file whose `metadata_server` is `server`, as it is read."""
    file = folder / "cluster.yaml"
    whole = {
        "cluster": "c",
        "model": {"path": "sim", "name": "sim"},
        "engine": {"kind": "sim"},
        "nodes": {"d": {"role": "decoder", "port": 8711, "segment": "16MiB"}},
        "metadata_server": server,
    }
    file.write_text(yaml.safe_dump(whole))
    return load_config(file)
