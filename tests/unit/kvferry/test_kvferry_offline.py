"""kvferry.LLM without vLLM: what it refuses, the cluster files it writes, and the store's processes."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import aiohttp
import msgspec
import pytest
from support.metadata_rigs import metadata_rig
from support.ports import free_ports
from support.process_tree import children

from kvcore.config.fields import ByteSize
from kvcore.config.file import load_config
from kvcore.config.kv.settings import KVConfig
from kvcore.config.schema import (
    ClusterConfig,
    MetadataServerConfig,
    ModelConfig,
    NodeConfig,
    SimEngineConfig,
    TorchEngineConfig,
    VllmEngineConfig,
)
from kvcore.errors import ConfigError, InvalidRequestError
from kvcore.handoff import HandoffKind
from kvcore.identity import ClusterIdentity
from kvcore.ports import base_url
from kvcore.types import Role
from kvferry.offline.cluster import (
    PRIVATE_PORTS,
    StoreCluster,
    check_arguments,
    check_room,
    choose_chunk_tokens,
    cluster_arguments,
    joined_cluster,
    private_cluster,
    read_store,
    write_cluster,
)
from kvferry.offline.llm import LLM
from kvferry.offline.store import OfflineStore
from metadata_server.messages import NodesReply

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
MIB = 1 << 20
CLUSTER = ClusterConfig(
    cluster="c",
    model=ModelConfig(path="/models/tiny", name="tiny", dtype="bfloat16"),
    engine=VllmEngineConfig(args={"block-size": 32, "--kv_cache_dtype": "fp8", "max-num-seqs": 4}),
    nodes={"d0": NodeConfig(role=Role.DECODER, port=9001, segment=ByteSize(MIB))},
    kv=KVConfig(chunk_tokens=64),
)


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch) -> Path:
    """Where the stores' folders are made, also by a program that a test starts."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def private(segment: int = 4 * MIB) -> StoreCluster:
    model = ModelConfig(path="/models/tiny", name="tiny")
    return private_cluster(model, ByteSize(segment), 128, free_ports(PRIVATE_PORTS))


def url_of(config: ClusterConfig) -> str:
    return base_url(config.metadata_server.host, config.metadata_server.port)


async def nodes_at(url: str) -> set[str]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/nodes") as reply:
        return {node.id for node in msgspec.json.decode(await reply.read(), type=NodesReply).nodes}


async def ended(pid: int) -> None:
    """Until the process has ended, whoever its parent is."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    gone, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(descriptor, gone.set)
    try:
        await asyncio.wait_for(gone.wait(), 60)
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


# --- what is refused ---------------------------------------------------------------------------------------------


def test_without_vllm_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigError, match=r"kvferry\[vllm\].*make venv-vllm"):
        LLM("some/model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kv_transfer_config": {}}, "kv_transfer_config: kvferry sets this itself"),
        ({"disable_hybrid_kv_cache_manager": False}, "kvferry sets this itself"),
        ({"data_parallel_size": 2}, "data_parallel_size: kvferry sets"),
        ({"revision": "main"}, "give the folder of that revision"),
        ({"kv_offloading_size": 4}, "give `store`"),
        ({"load_format": "dummy"}, "dummy weights"),
        ({"enable_sleep_mode": True}, "addresses of the KV memory"),
    ],
)
def test_arguments_that_contradict_the_store_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        LLM("some/model", **arguments)


def test_all_else_is_vllms_to_judge():
    check_arguments({"dtype": "float32", "max_model_len": 512, "tokenizer": "x", "load_format": "auto", "seed": 1})


@pytest.mark.parametrize("store", ["many", "no/such/cluster.yaml", 0, "-1GiB"])
def test_a_store_that_is_neither_size_nor_file_is_named(store):
    with pytest.raises(ConfigError, match="neither a size such as 2GiB nor the file of a running cluster"):
        read_store(store)


def test_a_cluster_whose_handoff_is_not_ours_has_no_store():
    with pytest.raises(ConfigError, match="has no store: its handoff is nixl"):
        read_store(msgspec.structs.replace(CLUSTER, handoff=HandoffKind.NIXL))


def test_a_store_is_a_size_or_a_cluster():
    assert read_store("2GiB") == 2 << 30
    assert read_store(4096) == 4096
    assert read_store(CLUSTER) is CLUSTER
    assert read_store(str(CONFIGS / "sim-2p2d.yaml")) == load_config(CONFIGS / "sim-2p2d.yaml")
    assert read_store(CONFIGS / "sim-2p2d.yaml") == load_config(CONFIGS / "sim-2p2d.yaml")


def test_a_segment_that_is_no_size_is_named():
    with pytest.raises(ConfigError, match="segment: 'big'"):
        LLM("some/model", segment="big")


# --- chunks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block_size", "expected"), [(16, 128), (32, 128), (48, 144), (128, 128), (256, 256)])
def test_chunks_are_the_smallest_whole_number_of_blocks_from_128_on(block_size, expected):
    assert choose_chunk_tokens(None, block_size, None) == expected


def test_chunks_of_a_cluster_are_the_clusters():
    assert choose_chunk_tokens(None, 32, CLUSTER) == 64
    assert choose_chunk_tokens(64, 32, CLUSTER) == 64
    with pytest.raises(ConfigError, match=r"chunk_tokens: 128 is not the cluster's 64"):
        choose_chunk_tokens(128, 32, CLUSTER)
    with pytest.raises(ConfigError, match=r"the cluster's kv.chunk_tokens: 64 is not a multiple of .* 128"):
        choose_chunk_tokens(None, 128, CLUSTER)


@pytest.mark.parametrize("asked", [100, -128])
def test_chunks_that_are_not_whole_blocks_are_refused(asked):
    with pytest.raises(ConfigError, match=f"chunk_tokens: {asked} is not a multiple of vLLM's block size 16"):
        choose_chunk_tokens(asked, 16, None)


def test_a_store_without_room_for_one_chunk_is_refused():
    check_room(private(segment=132 << 10), 1024)
    with pytest.raises(ConfigError, match=r"store: 128.0 KiB has no room for one chunk: 128 tokens .* 132.0 KiB"):
        check_room(private(segment=128 << 10), 1024)
    joined = joined_cluster(CLUSTER, "llm-1", "127.0.0.1", 9002, ByteSize(8192))
    with pytest.raises(ConfigError, match=r"segment: 8.0 KiB has no room"):
        check_room(joined, 1024)
    check_room(joined_cluster(CLUSTER, "llm-1", "127.0.0.1", 9002, None), 1024)


# --- cluster files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_a_joined_cluster_is_the_file_with_one_more_node(file, tmp_path):
    config = load_config(file)
    if config.handoff is not HandoffKind.KVFERRY:
        pytest.skip("it has no store")
    cluster = joined_cluster(config, "llm-1", "127.0.0.1", 9, ByteSize(MIB))
    written = tmp_path / "cluster.yaml"
    write_cluster(cluster.config, written)
    read = load_config(written)
    assert read == cluster.config
    assert cluster.joined and cluster.started == {"llm-1"}
    nodes = dict(read.nodes)
    assert nodes.pop("llm-1") == NodeConfig(role=Role.STORE, port=9, segment=ByteSize(MIB))
    assert msgspec.structs.replace(read, nodes=nodes, service=config.service) == config


def test_a_private_cluster_is_read_back_as_it_was_written(tmp_path):
    cluster = private()
    write_cluster(cluster.config, tmp_path / "cluster.yaml")
    assert load_config(tmp_path / "cluster.yaml") == cluster.config
    assert not cluster.joined and cluster.started == {"metadata-server", cluster.node_name}


def test_what_the_clusters_kv_depends_on_is_taken_from_its_file():
    assert cluster_arguments(CLUSTER) == {"dtype": "bfloat16", "block_size": 32, "kv_cache_dtype": "fp8"}
    for engine in (TorchEngineConfig(), SimEngineConfig()):
        assert cluster_arguments(msgspec.structs.replace(CLUSTER, engine=engine)) == {"dtype": "bfloat16"}


# --- processes ---------------------------------------------------------------------------------------------------


async def test_a_cluster_that_does_not_run_is_named_with_where_and_how_long(scratch):
    (port,) = free_ports(1)
    config = msgspec.structs.replace(CLUSTER, metadata_server=MetadataServerConfig(port=port))
    store = OfflineStore(joined_cluster(config, "llm-1", "127.0.0.1", 9, ByteSize(MIB)), reach_s=0.3)
    words = rf"cluster 'c' at http://127.0.0.1:{port} cannot be reached; .*waited 0.3 s; .*Connect"
    with pytest.raises(ConfigError, match=words):
        await asyncio.to_thread(store.start)
    assert not list(scratch.iterdir())


async def test_what_is_no_metadata_server_is_not_joined():
    async def say_no(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(say_no, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        config = msgspec.structs.replace(CLUSTER, metadata_server=MetadataServerConfig(port=port))
        store = OfflineStore(joined_cluster(config, "llm-1", "127.0.0.1", 9, ByteSize(MIB)))
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} is no metadata server"):
            await asyncio.to_thread(store.start)


async def test_the_metadata_server_of_another_cluster_is_not_joined():
    async with metadata_rig("http", identity=ClusterIdentity("other")) as rig:
        server = MetadataServerConfig(port=int(rig.url.rpartition(":")[2]))
        config = msgspec.structs.replace(CLUSTER, metadata_server=server)
        store = OfflineStore(joined_cluster(config, "llm-1", "127.0.0.1", 9, ByteSize(MIB)))
        with pytest.raises(ConfigError, match="is of cluster 'other', not 'c': correct metadata_server in"):
            await asyncio.to_thread(store.start)


@pytest.mark.slow
async def test_a_node_that_cannot_start_is_explained_by_its_last_lines(scratch):
    store = OfflineStore(private(segment=1 << 60))
    with pytest.raises(ConfigError, match=r"(?s)store ended with exit code 2 .*its last lines .*bytes do not fit"):
        await asyncio.to_thread(store.start)
    assert len(list(scratch.glob("*/store.log"))) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "kvferry-store"]


async def test_it_serves_until_it_is_closed_and_leaves_nothing(scratch):
    cluster = private()
    store = OfflineStore(cluster)
    try:
        assert repr(store) == f"<OfflineStore llm/store, not ready, {url_of(cluster.config)}>"
        report = await asyncio.to_thread(store.start)
        assert repr(store) == f"<OfflineStore llm/store, ready, {url_of(cluster.config)}>"
        assert report.node.id == cluster.node_name and report.segments[0].size_bytes == 4 * MIB
        assert await nodes_at(url_of(cluster.config)) == {cluster.node_name}
        pids = children(os.getpid())
        assert len(list(scratch.iterdir())) == 1 and len(pids) >= 2
    finally:
        await asyncio.to_thread(store.close)
    for pid in pids:
        await ended(pid)
    assert not list(scratch.iterdir())
    store.close()


@pytest.mark.slow
async def test_it_joins_a_cluster_for_as_long_as_it_lives():
    running, joined = OfflineStore(cluster := private()), None
    try:
        await asyncio.to_thread(running.start)
        (port,) = free_ports(1)
        joined = OfflineStore(joined_cluster(cluster.config, "llm-1", "127.0.0.1", port, None))
        await asyncio.to_thread(joined.start)
        assert await nodes_at(url_of(cluster.config)) == {cluster.node_name, "llm-1"}
        await asyncio.to_thread(joined.close)
        assert await nodes_at(url_of(cluster.config)) == {cluster.node_name}
    finally:
        for store in (joined, running):
            if store is not None:
                await asyncio.to_thread(store.close)


@pytest.mark.slow
async def test_a_node_that_is_killed_is_told_in_the_log():
    told, loop = asyncio.Event(), asyncio.get_running_loop()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "store_lost" in record.getMessage():
                loop.call_soon_threadsafe(told.set)

    listener, logger = Listener(), logging.getLogger("kvferry.offline")
    logger.addHandler(listener)
    store = OfflineStore(private())
    try:
        report = await asyncio.to_thread(store.start)
        os.kill(int(report.segments[0].addresses["shm"].partition(":")[0]), signal.SIGKILL)
        await asyncio.wait_for(told.wait(), 60)
    finally:
        await asyncio.to_thread(store.close)
        logger.removeHandler(listener)


@pytest.mark.slow
async def test_kill_minus_9_of_the_program_leaves_no_process():
    code = f"""
        import sys, time
        sys.path[:0] = {sys.path!r}
        from test_kvferry_offline import OfflineStore, children, os, private
        OfflineStore(private()).start()
        print(*children(os.getpid()), flush=True)
        sys.stdin.read()
    """
    program = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert program.stdout is not None
    pids = [int(pid) for pid in (await asyncio.wait_for(program.stdout.readline(), 30)).split()]
    assert len(pids) == 2
    program.kill()
    await program.wait()
    for pid in pids:
        await ended(pid)


def test_the_package_imports_nothing_heavy_until_llm_is_asked_for():
    code = (
        "import sys, kvferry; assert kvferry.__version__\n"
        "print([m for m in ('aiohttp', 'msgspec', 'torch', 'vllm', 'kvferry.offline') if m in sys.modules])\n"
        "from kvferry import LLM; print(LLM.__module__, 'vllm' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines() == ["[]", "kvferry.offline.llm False False"]


def test_a_name_that_the_package_has_not_is_an_attribute_error():
    import kvferry

    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = kvferry.Nothing


# --- documents ---


class Echo:
    """In the place of vLLM's."""

    def generate(self, prompts, sampling_params):
        return prompts


def echoing() -> LLM:
    llm = object.__new__(LLM)
    llm._llm = Echo()
    return llm


def test_documents_come_before_each_prompt_as_those_of_a_completion():
    documents = ["a text", {"title": "Ferries", "text": "another"}]
    assert echoing().generate("which?", documents=documents) == "a text\n\nFerries\nanother\n\nwhich?"
    assert echoing().generate(["which?", "why?"], documents=documents[:1]) == ["a text\n\nwhich?", "a text\n\nwhy?"]
    assert echoing().generate(["which?"]) == ["which?"]


@pytest.mark.parametrize(
    ("prompts", "documents", "words"),
    [([{"prompt_token_ids": [1]}], ["a text"], "a prompt of text"), ("which?", [{"title": "a"}], "text is missing")],
)
def test_documents_that_cannot_be_placed_are_refused_by_name(prompts, documents, words):
    with pytest.raises(InvalidRequestError, match=words):
        echoing().generate(prompts, documents=documents)
