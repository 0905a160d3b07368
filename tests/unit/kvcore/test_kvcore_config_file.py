from pathlib import Path

import pytest
import yaml

from kvcore.config.checks import engine_of
from kvcore.config.fields import ByteSize
from kvcore.config.file import load_config, node_config
from kvcore.config.parse import parse_byte_size
from kvcore.config.routing import RoutingPolicy
from kvcore.config.schema import ClusterConfig, SimEngineConfig, TorchEngineConfig
from kvcore.errors import ConfigError
from kvcore.types import Role
from kvstore.settings import chosen_verify

BASE = {
    "cluster": "c",
    "model": {"path": "models/m", "name": "m"},
    "engine": {"kind": "torch", "block_size": 64},
    "nodes": {"decode-0": {"role": "decoder", "port": 8200, "segment": "8MiB"}},
}
CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str, text: str | None = None, **changes: object) -> ClusterConfig:
        file = tmp_path / "c.yaml"
        file.write_text(text if text is not None else yaml.safe_dump({**BASE, **changes}))
        return load_config(file, overrides)

    return load


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("nodes.decode-0.segmnt=1MiB", r"nodes\.decode-0\.segmnt: '1MiB': unknown key \(did you mean segment\?\)"),
        ("clutser=x", r"clutser: 'x': unknown key \(did you mean cluster\?\)"),
        ("router.zzz=x", r"router\.zzz: 'x': unknown key \(known: host, port, admin_port, admin_host, "),
        ("nodes.decod-0.port=8201", r"nodes\.decod-0: no such node \(did you mean decode-0\?\)"),
        ("nodes.decode-0.segment=8MeB", r"nodes\.decode-0\.segment: '8MeB': expected a positive number of bytes"),
        ("nodes.decode-0.segment=0", r"nodes\.decode-0\.segment: 0: expected a positive number of bytes"),
        ("nodes.decode-0.role=decodr", r"nodes\.decode-0\.role: 'decodr': not valid \(did you mean decoder\?\)"),
        ("cluster=../../x", r"cluster: '\.\./\.\./x': a name of letters, digits"),
        ("cluster=..", r"cluster: '\.\.': a name of letters, digits"),
        ('cluster="a\\nb"', r"cluster: 'a\\nb': a name of letters, digits"),
        ("nodes.decode-0.port=70000", r"nodes\.decode-0\.port: 70000: expected int <= 65535"),
        ("nodes.decode-0.port='80'", r"nodes\.decode-0\.port: '80': expected int, got str"),
        (
            f"nodes.decode-0.segment={'9' * 400}",
            r"nodes\.decode-0\.segment: 9+\.\.\.: expected a positive number of bytes",
        ),
        ("router.request_timeout_s=.inf", r"router\.request_timeout_s: inf: expected a finite number"),
        ("nodes.decode-0=5", r"nodes\.decode-0: 5: expected a section"),
        ("engine.kind=troch", r"engine\.kind: unknown kind 'troch' \(did you mean torch\?\)"),
        ("engine.threads=0", r"engine\.threads: 0: expected int >= 1"),
        ("transport=tpc", r"transport\.kind: 'tpc': not valid \(did you mean tcp\?\)"),
        ("transport.devices=mlx5_0", r"transport\.devices: 'mlx5_0': expected array"),
        ("router.request_timeout_s=-1", r"router\.request_timeout_s: -1: expected float > 0"),
        ("kv.verify=mac", r"kv\.verify: mac needs the cluster's secret: set security\.secret"),
        ("tiers.redis={url: r, encrypt: true}", r"tiers\.redis\.encrypt: it needs the cluster's secret"),
        ("kv.encrypt=true", r"kv\.encrypt: it needs the cluster's secret: set security\.secret"),
        ("kv={encrypt: true, verify: checksum}", r"kv\.encrypt: .* proved too; .*verify: checksum out"),
        ("kv={encrypt: true, verify: false}", r"kv\.encrypt: .* proved too; .*verify: False out"),
        ("kv.verify=5", r"kv\.verify: 5: not valid \(known: checksum, mac\)"),
        ("kv.verify=mack", r"kv\.verify: 'mack': not valid \(did you mean mac\?\)"),
        ("service.log_level=loud", r"service\.log_level: 'loud': not valid \(known: debug"),
        ("nodes.decode-0.segment=5", r"nodes\.decode-0\.segment: 5 bytes hold no chunk .* missing, as in 5GB\?"),
        ("model.max_context=255", r"kv\.chunk_tokens: 256 is over model\.max_context 255; no prompt would fill"),
        (
            "nodes.decode-0.engine={kind: sim, max_context: 128}",
            r"kv\.chunk_tokens: 256 is over nodes\.decode-0\.engine\.max_context 128",
        ),
        ("engine={kind: sim, max_context: 128}", r"kv\.chunk_tokens: 256 is over engine\.max_context 128"),
        ("kv.chunk_tokens=100", r"engine\.block_size: 64 does not divide kv\.chunk_tokens 100"),
        ("nodes.decode-0.role=prefiller", r"nodes: no node has role decoder"),
        ("router.port=8200", r"nodes\.decode-0\.port: 8200 on 127\.0\.0\.1 is router\.port already"),
        ("store.low_watermark=0.99", r"store\.low_watermark: 0\.99 is not below store\.high_watermark 0\.95"),
        ("devices=[mlx5_0]", r"transport\.devices: only transports ucx and nixl use devices, this is auto"),
        ("transport.fallback=ucx", r"transport\.fallback: 'ucx': not valid \(known: auto, shm, tcp\)"),
        ("transport.fallback=nixl", r"transport\.fallback: 'nixl': not valid \(known: auto, shm, tcp\)"),
        ("transport.integrity=frames", r"transport\.integrity: frames needs the cluster's secret"),
        ("transport.integrity=some", r"transport\.integrity: 'some': not valid \(known: greeting, frames\)"),
        ("transport.fallback=tcp", r"transport\.fallback: only transports ucx and nixl ever use one, this is auto"),
        ("nodes.router={role: store, port: 1}", r"nodes\.router: the name stands for the cluster's own router"),
        ("nodes.s={role: store, port: 1, engine: {kind: sim}}", r"nodes\.s\.engine: a store has no engine"),
        ("nodes.decode-0.engine={kind: sim, bytes_per_token: 24}", r"bytes_per_token: 24 is not a multiple of 16"),
        ("nodes.decode-0.host=0.0.0.0", r"nodes\.decode-0\.host: 0\.0\.0\.0 is every interface; give the address"),
        ("metadata_server.mooncake={cert: a}", r"metadata_server\.mooncake\.key: missing; TLS needs"),
        ("metadata_server.mooncake={key: a}", r"metadata_server\.mooncake\.cert: missing; TLS needs"),
        ("metadata_server.mooncake={cert: a, key: b}", r"metadata_server\.mooncake\.port: missing; TLS is on a port"),
        (
            "metadata_server.mooncake.port=8700",
            r"metadata_server\.mooncake\.port: 8700 on 127\.0\.0\.1 is metadata_server",
        ),
        ("nodes.d={role: decoder, port: 1, engine: {kind: sim}}", r"engine: the nodes' engines are of several kinds"),
    ],
)
def test_a_wrong_value_is_named_with_file_path_value_and_remedy(load, override, message):
    with pytest.raises(ConfigError, match=r"c\.yaml: .*" + message):
        load(override)


@pytest.mark.parametrize("override", ["router.port", "=3", "a..b=1", "cluster.x=1", "router.port=[", "router.port=*"])
def test_a_malformed_override_is_named(load, override):
    with pytest.raises(ConfigError, match=r"--set "):
        load(override)


@pytest.mark.parametrize("transport", [None, ["tcp"]])
@pytest.mark.parametrize("override", ["transport=tcp", "devices=[mlx5_0]", "transport.kind=tcp"])
def test_an_override_within_what_is_no_section_is_named(load, transport, override):
    with pytest.raises(
        ConfigError, match=f"--set {override.replace('[', '.').replace(']', '.')}: transport is not a section"
    ):
        load(override, transport=transport)


def test_missing_keys_are_named(load):
    with pytest.raises(ConfigError, match=r"nodes\.d\.port: missing"):
        load(nodes={"d": {"role": "decoder"}})
    with pytest.raises(ConfigError, match=r"engine\.kind: missing \(one of torch, sim, vllm\)"):
        load(engine={"threads": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", "not valid YAML at line 2, column 2"),
        ("nodes: {a: 1, a: 2}", "not valid YAML at line 1, column 15: a given twice"),
        ("? [a]\n: 1", "not valid YAML at line 1"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: \x01", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML at line 1"),
        ("a: 010", "line 1, column 4: 010 is a number to base 8 in YAML; write it in decimal, or in quotes"),
        ("a: -0_17", "-0_17 is a number to base 8"),
        ("a: 22:16", "22:16 is a number to base 60"),
        (f"a: {'9' * 5000}", "line 1, column 4: a whole number of 5000 digits"),
        (f"a: 0x{'9' * 50000}", "a whole number of 50002 digits"),
        (f"a: {'[' * 900}", "its brackets are nested too deeply"),
        (f"a: {'{b: ' * 900}", "its brackets are nested too deeply"),
        ("a: 2024-13-45", "not valid YAML: month must be in 1..12"),
    ],
)
def test_a_file_that_is_no_cluster_file_is_refused(load, text, message):
    with pytest.raises(ConfigError, match=message):
        load(text=text)


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "laptop.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"labtop\.yaml: no such file \(did you mean .*laptop\.yaml\?\)"):
        load_config(tmp_path / "labtop.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "laptop.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_several_broken_rules_are_told_together(load):
    with pytest.raises(ConfigError) as caught:
        load("kv.chunk_tokens=100", "router.port=8200")
    assert len(caught.value.message.splitlines()) == 2


def test_an_unknown_node_lists_those_there_are(load):
    with pytest.raises(ConfigError, match=r"no node 'decode-9' .*did you mean decode-0\? it has decode-0"):
        node_config(load(), "decode-9")
    assert node_config(load(), "decode-0").role is Role.DECODER


def test_overrides_parse_into_the_same_types(load):
    config = load(
        "router.policy=round_robin",
        "nodes.decode-0.segment=1.5KiB",
        "nodes.store-0={role: store, port: 9000}",
        "service.drain_s=3",
        "kv.verify=false",
        "transport=tcp",
        "transport.streams=4",
    )
    assert config.router.policy is RoutingPolicy.ROUND_ROBIN
    assert config.nodes["decode-0"].segment == 1536 and isinstance(config.nodes["decode-0"].segment, ByteSize)
    assert config.nodes["store-0"].role is Role.STORE
    assert (config.service.drain_s, config.kv.verify) == (3.0, False)
    assert (config.transport.kind, config.transport.streams) == ("tcp", 4)


@pytest.mark.parametrize(
    ("said", "plain", "secured"),
    [("true", "checksum", "mac"), ("false", "header", "header"), ("checksum", "checksum", "checksum")],
)
def test_what_is_checked_of_chunks_follows_the_secret_unless_it_is_said(load, said, plain, secured):
    assert chosen_verify(load(f"kv.verify={said}")) == plain
    assert chosen_verify(load(f"kv.verify={said}", "security.secret.env=S")) == secured
    assert chosen_verify(load("kv.verify=mac", "security.secret.env=S")) == "mac"


def test_whole_numbers_are_as_they_look(load):
    for text, port in (("8201", 8201), ("0x1fa4", 8100), ("8_100", 8100), ("+8100", 8100)):
        assert load(f"nodes.decode-0.port={text}").nodes["decode-0"].port == port


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 900, "017"])
def test_an_override_that_cannot_be_read_is_named_in_one_short_line(load, value):
    with pytest.raises(ConfigError, match=r"^--set router\.port=[^\n]{1,150}$"):
        load(f"router.port={value}")


def test_the_transport_can_be_overridden_as_a_section(load):
    assert load("transport={kind: tcp, streams: 3}", transport="shm").transport.streams == 3


def test_the_short_form_of_transport_takes_devices_beside_it(load):
    transport = load(transport="ucx", devices=["mlx5_0"]).transport
    assert (transport.kind, transport.devices) == ("ucx", ["mlx5_0"])


def test_devices_in_two_places_are_refused(load):
    with pytest.raises(ConfigError, match=r"devices: .*: unknown key"):
        load(transport={"kind": "ucx", "devices": ["a"]}, devices=["b"])


def test_a_model_path_is_relative_to_the_file_and_home_is_expanded(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert load().model.path == "models/m"  # no such folder: a hub id
    (tmp_path / "models/m").mkdir(parents=True)
    assert load().model.path == str(tmp_path / "models/m")
    assert load("model.path=./x/y").model.path == str(tmp_path / "x/y")
    assert load("model.path=~/m").model.path == "/home/somebody/m"
    assert load("model.path=/m").model.path == "/m"
    assert load("engine={kind: sim}", "model.path=sim").model.path == "sim"


def test_a_node_may_have_its_own_engine_and_a_store_has_none(load):
    config = load("nodes.decode-0.engine={kind: torch, threads: 2}", "nodes.s={role: store, port: 1}")
    engine = engine_of(config, config.nodes["decode-0"])
    assert isinstance(engine, TorchEngineConfig) and engine.threads == 2
    assert engine_of(config, config.nodes["s"]) is None


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 512 << 20), ("2GB", 2 * 10**9), (7, 7), ("8", 8), ("1 kib", 1024)]
)
def test_byte_sizes(text, size):
    assert parse_byte_size(text) == size


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)
def test_every_shipped_config_loads(file):
    config = load_config(file)
    assert config.cluster
    if file.name == "sim-2p2d.yaml":
        assert isinstance(config.engine, SimEngineConfig)
    if file.name == "cluster.yaml":
        assert (config.transport.kind, config.transport.devices) == ("ucx", ["mlx5_0"])


def test_a_metadata_server_on_every_interface_needs_nodes_on_this_machine(load):
    everywhere = {"host": "0.0.0.0"}
    known = {"secret": {"file": "secret"}}
    assert load(metadata_server=everywhere, router=everywhere, security=known).router.host == "0.0.0.0"
    with pytest.raises(ConfigError, match=r"metadata_server\.host: 0\.0\.0\.0 is every interface; give the address"):
        load("nodes.decode-0.host=gpu-1", metadata_server=everywhere, security=known)


@pytest.mark.parametrize("origin", ["app.example", "http://app.example/", "http://", "ftp//x", "", "null"])
def test_an_origin_is_no_address_of_a_page(load, origin: str) -> None:
    with pytest.raises(ConfigError, match=r"router\.cors"):
        load(router={"cors": [origin]})


def test_pages_of_this_machine_alone_may_use_the_router_unless_others_are_named(load) -> None:
    assert load().router.cors == ["loopback"]
    named = ["*", "loopback", "http://app.example:3000", "https://[::1]:80", "vscode-webview://abc"]
    assert load(router={"cors": named}).router.cors == named and load(router={"cors": []}).router.cors == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.adapters": "{a: x}"},
            r"model\.adapters: engine: the torch engine serves no adapters; engine\.kind: vllm",
        ),
        ({"model.adapters": "{'': x}"}, r"model\.adapters\.: the name of an adapter has 1 to 256 printable"),
        (
            {"model.adapters": "{small: x}", "model.aliases": "[small]"},
            r"adapters\.small: the model itself is called small",
        ),
        ({"model.adapters": "{a: 5}"}, r"model\.adapters\.a: 5: expected str"),
        ({"model.adapters": "{a: ''}"}, r"model\.adapters\.a: ''"),
        ({"model.adapters": "[a]"}, r"model\.adapters: "),
    ],
)
def test_what_is_wrong_with_adapters_is_named(load, changes, message):
    torch = {"kind": "torch"}
    with pytest.raises(ConfigError, match=message):
        load(*(f"{path}={value}" for path, value in changes.items()), engine=torch)


def test_paths_of_adapters_are_relative_to_the_file_and_names_to_the_simulated_engine(load, tmp_path):
    vllm = load("model.adapters={a: ./loras/a, b: /b, c: org/on-the-hub}", "engine={kind: vllm}").model.adapters
    assert vllm == {"a": str(tmp_path / "loras/a"), "b": "/b", "c": "org/on-the-hub"}
    assert load("model.adapters={a: x}", "engine={kind: sim}").model.adapters == {"a": "x"}
