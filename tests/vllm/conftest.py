"""These tests run in vLLM's environment (`make vllm`); elsewhere this folder is passed over.

A start of vLLM is 20 s of one core, most of it imports, so starts are few and two tests run at a time. One cluster
serves all of test_vllm_cluster_*: a tiny Qwen3 (`tiny` is its folder), one prefiller and two decoders in turn, each
bound to a core as far as there are.
"""

import importlib.metadata
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from support.cluster import ClusterHandle, cluster
from support.tiny_models import make_tiny_model
from support.vllm_reference import References

try:
    importlib.metadata.version("vllm")  # not find_spec: this folder itself would do as a package of that name
except importlib.metadata.PackageNotFoundError:
    collect_ignore_glob = ["*.py"]

CONTEXT = 4224


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies here; the hook is called with the tests of all folders."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.vllm)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where two tests run at a time: all that use the cluster in one process, the others one by one."""
    from xdist.scheduler import LoadScopeScheduling

    class OneCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if Path(file).name.startswith("test_vllm_cluster_"):
                return "cluster"
            one_fixture = ("test_vllm_environment.py", "test_differential.py")
            return file if file.endswith(one_fixture) else nodeid

    return OneCluster(config, log)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder."""
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("model") / "qwen3", max_context=CONTEXT, head_dim=64)


@pytest.fixture(scope="session")
def single(tiny: Path) -> Iterator[References]:
    """What one vLLM without kvferry answers that has the model."""
    with closing(References("tiny", tiny, max_model_len=CONTEXT)) as single:
        yield single


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def subject(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClusterHandle]:
    """The cluster. Tests leave it as whole as they found it."""
    overrides = [
        "router.policy=round_robin",
        "router.min_prefill_tokens=0",
        "router.decoder_prefill=needed",
        "engine.args.kv-cache-memory-bytes=14M",  # 35 blocks: one prompt of CONTEXT tokens, or little more
        *(f"nodes.{node}.segment=64MiB" for node in ("prefill-0", "decode-0", "decode-1")),
    ]
    folder = tmp_path_factory.mktemp("vllm-cluster")
    async with cluster(folder, engine="vllm", model=tiny, prefillers=1, decoders=2, overrides=overrides) as handle:
        yield handle
