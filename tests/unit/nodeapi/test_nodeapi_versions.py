"""Router and nodes of different versions: fields that came later, in each message and each direction."""

import inspect

import msgspec
import pytest
from aiohttp import web
from support.router_fakes import FakeNode, serve, spec

from kvcore.clock import ManualClock
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, SimEngineConfig
from kvcore.errors import InvalidRequestError, NodeVersionError
from kvcore.types import NodeInfo, Role, Segment
from kvnode.request_check import parse_request
from nodeapi import documents as d
from nodeapi import messages as m
from nodeapi import prompt_logprobs as p
from nodeapi import sampling as s
from nodeapi import upkeep as u
from nodeapi.client import HttpNodeClient
from nodeapi.sampling import SamplingParams
from router.nodes.cluster import Cluster
from router.nodes.prober import Prober

LATER = "a_field_of_a_later_version"
MOVED = m.Moved(transport="shm", direction="put", num_bytes=1, seconds=0.5)
TIMINGS = m.Timings(queue_s=1.0)
LEG = m.LegInfo(cached_tokens=1, computed_tokens=2, moved=[MOVED], timings=TIMINGS)
SCORES = p.PromptLogprobs.pack(1, 1, [p.PromptRow(5, -1.0, 2, [(4, -0.5)])])
LOGPROB = m.TokenLogprob(logprob=-1.0, top=[(1, -1.0)])
SAMPLING = SamplingParams(max_tokens=4, logit_bias={1: 2.0}, allowed_token_ids=[1], bad_words_token_ids=[[1, 2]])
DOCUMENTS = d.Documents(header=1, spans=[(1, 3)])
HANDOFF = m.Handoff(num_chunks=1, wait_s=1.0)
ENGINE = FakeNode("d0", Role.DECODER).report().engine
STATS = m.EngineStats(running=1, counters={"aborted": 1})
assert ENGINE is not None
MARKED = u.GenerationMarked(owner="me", until=1.0)
HELD = u.GenerationHeld(fingerprint=b"f" * 16, num_chunks=1, num_bytes=2, marks=[MARKED], used=(1.0, 2.0), keys=[b"k"])
PLACE = u.GenerationsPlace(name="disk", held=[HELD])

REQUESTS: list[msgspec.Struct] = [
    SAMPLING,
    HANDOFF,
    m.PrefillRequest(request_id="a", prompt_token_ids=[1], deadline_s=1.0),
    m.GenerateRequest(request_id="a", prompt_token_ids=[1], sampling=SAMPLING, handoff=HANDOFF, deadline_s=1.0),
    DOCUMENTS,
    d.CompareRequest(request_id="a", prompt_token_ids=[1], documents=DOCUMENTS, deadline_s=1.0),
    m.ProbeRequest(peer="d0", timeout_s=1.0),
    m.PromoteRequest(fingerprint=b"f" * 16, keys=[b"k" * 16], deadline_s=1.0, owner=b"o" * 8),
    u.GenerationsRequest(tiers=["disk"], deadline_s=1.0),
    u.ChunksRequest(
        action="expire", fingerprint=b"f" * 16, keys=[b"k" * 16], tiers=["disk"], ttl_s=1.0, deadline_s=1.0
    ),
    u.WeightsRequest(version="step-1", wait_s=1.0, deadline_s=2.0),
    u.ClearRequest(fingerprints=[b"f" * 16], tiers=["disk"], own=["me"], deadline_s=1.0),
]
REPLIES: list[msgspec.Struct] = [
    TIMINGS,
    MOVED,
    LEG,
    LOGPROB,
    ENGINE,
    STATS,
    m.Greeting(),
    m.PrefillResult(
        request_id="a", cached_tokens=1, computed_tokens=2, stored_chunks=3, moved=[MOVED], timings=TIMINGS
    ),
    m.TokenDelta(token_ids=[1], logprobs=[LOGPROB], finish_reason=m.FinishReason.STOP, info=LEG),
    m.TokenDelta(prompt_logprobs=SCORES),
    SCORES,
    m.StreamError(code="overloaded", message="full", retryable=True),
    m.NodeReport(
        protocol=m.PROTOCOL,
        node=NodeInfo(id="d0", role=Role.DECODER, control_url="http://x", incarnation=1),
        engine=ENGINE,
        stats=STATS,
        segments=[Segment(id="d0.1", node_id="d0", size_bytes=1, host_id="h", addresses={"tcp": "x:1"})],
    ),
    m.ProbeReport(
        node="p0", peer="d0", asked="tcp", transport="tcp", shown="tcp", devices=[], link_rate=None, latency_s=1.0,
        put_rate=1.0, get_rate=1.0, copy_rate=1.0, num_bytes=1, seconds=1.0,
    ),
    d.CompareReply(request_id="a", token_ids=[1], kl=[0.5], gaps=[0.0]),
    m.Promoted(tier="disk"),
    m.TierChoice(tier="disk", use="load"),
    m.PromoteReply(promoted=[m.Promoted(tier="disk")]),
    m.TierReport(name="disk", shared=False),
    MARKED,
    HELD,
    PLACE,
    u.GenerationsReply(places=[PLACE], owner="me"),
    u.ChunksPlace(name="disk", found=[True]),
    u.ChunksReply(places=[u.ChunksPlace(name="disk")]),
    u.ClearedPlace(name="disk", incomplete="late"),
    u.WeightsReply(fingerprint=b"f" * 16, version="step-1", cut=1),
    u.ClearReply(places=[u.ClearedPlace(name="disk")]),
]  # fmt: skip
names = pytest.mark.parametrize


def name(message: msgspec.Struct) -> str:
    return type(message).__name__


def later(value: object) -> object:
    """What a later version would send: every struct inside has a field more. KV specs excepted: they are strict."""
    if isinstance(value, list):
        return [later(item) for item in value]
    if not isinstance(value, msgspec.Struct):
        return value
    fields = {key: later(getattr(value, key)) for key in value.__struct_fields__}
    tag = value.__struct_config__.tag
    return fields | ({"type": tag} if tag is not None else {}) | ({} if value == spec() else {LATER: [1]})


def test_each_message_of_the_api_is_held_to_one_of_the_rules() -> None:
    known = {
        kind
        for module in (m, p, s, u, d)
        for key, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, msgspec.Struct) and kind.__module__ == module.__name__ and not key.startswith("_")
    }
    assert known == {type(message) for message in [*REQUESTS, *REPLIES]}


@names("message", REQUESTS, ids=name)
def test_a_node_refuses_a_request_with_a_field_that_it_does_not_know(message: msgspec.Struct) -> None:
    body = msgspec.msgpack.encode({**msgspec.structs.asdict(message), LATER: 1})
    with pytest.raises(msgspec.ValidationError, match=LATER):
        msgspec.msgpack.decode(body, type=type(message))


def test_the_refusal_names_the_field_also_inside_of_another() -> None:
    request = REQUESTS[3]
    assert isinstance(request, m.GenerateRequest)
    nested = {**msgspec.structs.asdict(request), "sampling": {**msgspec.structs.asdict(SAMPLING), LATER: 1}}
    with pytest.raises(InvalidRequestError, match=f"{LATER}.*sampling"):
        parse_request(msgspec.msgpack.encode(nested), m.GenerateRequest, ENGINE)


@names("message", REPLIES, ids=name)
@names("codec", [msgspec.msgpack, msgspec.json], ids=["msgpack", "json"])
def test_a_router_reads_a_later_reply_and_leaves_out_what_it_does_not_know(message: msgspec.Struct, codec) -> None:
    assert codec.decode(codec.encode(later(message)), type=type(message)) == message


@names("message", [*REQUESTS, *REPLIES], ids=name)
def test_a_field_that_an_earlier_version_does_not_send_has_its_default(message: msgspec.Struct) -> None:
    """Each optional field by itself, and all of them together."""
    full = msgspec.to_builtins(message, builtin_types=(bytes,))
    optional = [field for field in msgspec.structs.fields(message) if not field.required]
    for absent in [[field] for field in optional] + [optional]:
        sent = {key: value for key, value in full.items() if key not in {field.name for field in absent}}
        got = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=type(message))
        defaults = {
            field.name: field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
            for field in absent
        }
        assert got == msgspec.structs.replace(message, **defaults)


def test_a_node_without_a_protocol_in_its_greeting_speaks_the_first() -> None:
    assert msgspec.msgpack.decode(b"\x80", type=m.Greeting).protocol == 1


def greeting_app(**greeting: object) -> web.Application:
    async def info(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.msgpack.encode(greeting))

    app = web.Application()
    app.router.add_get("/v1/info", info)
    return app


async def test_a_newer_node_that_speaks_the_routers_version_too_is_used() -> None:
    report = msgspec.structs.replace(FakeNode("d0", Role.DECODER).report(), protocol=m.PROTOCOL + 1)
    client = HttpNodeClient(connect_timeout_s=1, max_connections=10)
    async with serve(greeting_app(**msgspec.to_builtins(report, builtin_types=(bytes,)))) as url:
        assert await client.info(url, timeout_s=1) == report
    await client.aclose()


@names(("protocol", "older"), [(0, "the node"), (m.PROTOCOL + 1, "the router")])
async def test_a_node_without_a_version_that_the_router_speaks_is_refused_by_name(protocol: int, older: str) -> None:
    """Also where nothing else of its report can be read; and it is no node that is silent."""
    client = HttpNodeClient(connect_timeout_s=1, max_connections=10)
    said = (
        f"speaks versions {protocol} to {protocol} of the nodes' API, this router {m.OLDEST_PROTOCOL} to {m.PROTOCOL}: "
    )
    async with serve(greeting_app(protocol=protocol, oldest_protocol=protocol, node="of another shape")) as url:
        with pytest.raises(NodeVersionError, match=f"{said}upgrade {older}"):
            await client.info(url, timeout_s=1)
        config = ClusterConfig(
            cluster="c",
            model=ModelConfig(name="m", path="p"),
            engine=SimEngineConfig(),
            nodes={"d0": NodeConfig(role=Role.DECODER, url=url)},
        )
        cluster = Cluster(config, ManualClock())
        await Prober(config.router, cluster, client, ManualClock()).probe()
        node = cluster.nodes["d0"]
        assert node.problem is not None and f"{url} {said}" in node.problem
        assert node.silent_since is None
        assert not cluster.view().decoders
        assert f"d0: {url} {said}" in cluster.why_no_decoder()
    await client.aclose()
