"""Tokens that go straight from a node's connection to the client's: in order, held back, stopped, and what breaks."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiohttp import web
from support.delta_readers import Collected
from support.http_wire import Wire, connected
from support.router_fakes import FakeNode, FakeNodes, Rig, expected, make_rig, node_app, serve, two_and_two, until

from kvcore.errors import DeadlineExceededError, EngineError
from kvcore.process.http_exchange import HttpExchange
from kvcore.types import Role
from nodeapi.client import MAX_TAKEN, HttpNodeClient
from nodeapi.frames import pack_frame
from nodeapi.messages import FinishReason, GenerateRequest, TokenDelta
from nodeapi.protocol import DeltaReader
from nodeapi.sampling import SamplingParams
from router.api.formats.completion_format import CompletionFormatter
from router.api.out import StraightOut
from router.requests.events import Emit, Fail, Finish
from router.requests.flow.outputs import Outputs
from router.requests.limits import RequestLimits
from router.requests.run import RequestRun
from router.requests.spec import RequestSpec

PROMPT = "hello" * 20
IMPATIENT = RequestLimits(patience_s=0.0, retry_pause_s=0.01, max_unread=16)


class Stepping(FakeNode):
    """A decoder that says a token each time it is let: so many more as `may`. `text` is what it says."""

    may = 0
    text = ""

    async def _deltas(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        ids = list(self.text.encode())[len(request.output_token_ids) : request.sampling.max_tokens]
        for number, token in enumerate(ids):
            while self.may <= 0:  # noqa: ASYNC110 - a turn or two
                await asyncio.sleep(0)
            self.may -= 1
            reason = FinishReason.LENGTH if number == len(ids) - 1 else None
            yield TokenDelta(index=0, token_ids=[token], finish_reason=reason)


async def rig_of(text: str, names: tuple[str, ...] = ("d0",)) -> tuple[Rig, Stepping]:
    nodes = [Stepping(name, Role.DECODER) for name in names]
    for node in nodes:
        node.text = text
    return await make_rig(FakeNodes(list[FakeNode](nodes)), limits=IMPATIENT), nodes[0]


def ask(rig: Rig, **fields: object) -> tuple[object, Wire]:
    """A stream over a connection without a socket."""
    protocol, wire, _ = connected(rig.app)
    body = json.dumps({"model": "fake-model", "prompt": PROMPT, "stream": True, **fields}).encode()
    protocol.data_received(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    return protocol, wire


def texts(wire: Wire) -> str:
    """What the events say that have been written."""
    chunks = [part for part in wire.sent.split(b"\r\n") if part.startswith(b"data: {")]
    events = [
        json.loads(event[6:]) for chunk in chunks for event in chunk.split(b"\n\n") if event.startswith(b"data: {")
    ]
    return "".join(choice["text"] for event in events for choice in event.get("choices", ()))


@pytest.fixture
def straight(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was written without a task."""
    written: list[bytes] = []
    write, part = HttpExchange.write, StraightOut.part

    def noting(self: HttpExchange, body: bytes) -> None:
        written.append(body)
        write(self, body)

    async def by_task(self: StraightOut, body: bytes, *, more: bool = True) -> None:
        before = len(written)
        await part(self, body, more=more)
        del written[before:]

    monkeypatch.setattr(HttpExchange, "write", noting)
    monkeypatch.setattr(StraightOut, "part", by_task)
    return written


async def turns() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def test_all_but_the_first_token_and_the_last_is_written_straight(straight: list[bytes]) -> None:
    rig, node = await rig_of("abcdefgh")
    _, wire = ask(rig, max_tokens=8)
    for number in range(1, 9):
        node.may = 1
        await until(lambda number=number: texts(wire) == "abcdefgh"[:number])
    await until(lambda: wire.sent.endswith(b"0\r\n\r\n"))
    assert b"data: [DONE]\n\n" in wire.sent and 6 <= len(straight) <= 7
    assert rig.log.in_flight == 0


async def test_a_client_that_takes_nothing_holds_the_node_back_and_gets_all_in_order(straight: list[bytes]) -> None:
    text = "".join(chr(ord("a") + number % 26) for number in range(200))
    rig, node = await rig_of(text)
    protocol, wire = ask(rig, max_tokens=200)
    node.may = 5
    await until(lambda: len(texts(wire)) == 5)
    protocol.pause_writing()  # type: ignore[attr-defined]
    node.may = 500
    await turns()
    await turns()
    assert texts(wire) == text[:5] and node.may > 500 - 200, "nothing is written, and the node is not read to its end"
    protocol.resume_writing()  # type: ignore[attr-defined]
    await until(lambda: wire.sent.endswith(b"0\r\n\r\n"))
    assert texts(wire) == text and len(straight) > 0
    assert rig.log.in_flight == 0 and node.running == 0


async def test_a_stop_string_in_a_token_that_goes_straight_ends_the_leg_and_blames_nobody(
    straight: list[bytes],
) -> None:
    rig, node = await rig_of("one two END three four five")
    _, wire = ask(rig, max_tokens=27, stop="END", stream_options={"include_usage": True})
    for _ in range(11):
        node.may = 1
        await turns()
    await until(lambda: wire.sent.endswith(b"0\r\n\r\n"))
    assert texts(wire) == "one two " and straight and b'"completion_tokens":11' in wire.sent
    await until(lambda: node.running == 0 and rig.log.in_flight == 0)
    (record,) = rig.log.newest(lambda _: True)
    assert (record.state, record.retries, [leg.error for leg in record.legs]) == ("ok", 0, [None])
    assert rig.cluster.nodes["d0"].trust.suspected is False and node.aborted


async def test_a_formatter_that_fails_ends_the_stream_and_no_leg_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig, _ = await rig_of("abcdefgh", ("d0", "d1"))
    chunk, seen = CompletionFormatter.chunk, 0

    def failing(self: CompletionFormatter, piece: object) -> bytes:
        nonlocal seen
        seen += 1
        if seen == 4:
            raise ValueError("a bug")
        return chunk(self, piece)  # type: ignore[arg-type]

    monkeypatch.setattr(CompletionFormatter, "chunk", failing)
    _, wire = ask(rig, max_tokens=8)
    for one in rig.nodes.nodes:
        one.may = 8  # type: ignore[attr-defined]
    await until(lambda: wire.sent.endswith(b"0\r\n\r\n"))
    assert texts(wire) == "abc" and b"internal error" in wire.sent and b"[DONE]" not in wire.sent
    (record,) = rig.log.newest(lambda _: True)
    assert record.retries == 0 and len(record.legs) == 1
    await until(lambda: not any(one.running for one in rig.nodes.nodes))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_that_has_ended_is_freed_without_a_collection(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = await make_rig(two_and_two())
    begun: list[weakref.ref[RequestRun]] = []
    open_one = rig.dispatcher.open

    def noting(*given: Any, **named: Any) -> RequestRun:
        run = open_one(*given, **named)
        begun.append(weakref.ref(run))
        return run

    monkeypatch.setattr(rig.dispatcher, "open", noting)
    gc.disable()
    try:
        _protocol, wire = ask(rig, max_tokens=4, stream=stream)
        await until(lambda: b'"finish_reason":"length"' in wire.sent and rig.log.in_flight == 0)
        await rig.dispatcher.aclose()
        await turns()
        assert [run() for run in begun] == [None]
    finally:
        gc.enable()


def emit(token: int, index: int = 0) -> Emit:
    return Emit(index, [token])


async def test_outputs_keep_their_order_whatever_is_taken() -> None:
    outputs, taken, read, takes = Outputs(4), list[int](), list[int](), [True]

    def take(one: Emit) -> bool:
        if takes[0]:
            taken.extend(one.token_ids)
            read.extend(one.token_ids)
        return takes[0]

    async def reads() -> None:
        async for one in outputs:
            read.extend(one.token_ids)

    outputs.add(emit(0))
    outputs.deliver()
    outputs.take = take
    reading = asyncio.create_task(reads())
    await asyncio.sleep(0)
    for number in range(1, 9):
        takes[0] = number not in (3, 4)
        outputs.add(emit(number))
        outputs.deliver()
        if number in (5, 8):
            await asyncio.sleep(0)
    outputs.close(Finish())
    await reading
    assert (read, taken) == (list(range(9)), [1, 2, 6, 7, 8]), "5 comes behind 3 and 4, which were not taken"


async def test_what_comes_with_the_end_is_taken_before_the_reader_is_woken_but_for_what_that_drops() -> None:
    outputs, taken = Outputs(4), list[int]()

    def take(one: Emit) -> bool:
        taken.extend(one.token_ids)
        if one.token_ids == [2]:
            outputs.drop(0)
        return True

    async def reads() -> list[Emit]:
        return [one async for one in outputs]

    outputs.take = take
    reading = asyncio.create_task(reads())
    await asyncio.sleep(0)
    for number in (1, 2, 3):
        outputs.add(emit(number))
    outputs.add(emit(4, index=1))
    outputs.close(Finish())
    outputs.deliver()
    async with asyncio.timeout(60):
        assert (await reading, taken) == ([], [1, 2, 4])


async def test_what_a_reader_raises_is_raised_where_it_reads() -> None:
    outputs = Outputs(4)

    def take(one: Emit) -> bool:
        raise ValueError("a bug")

    outputs.take = take
    reading = asyncio.create_task(anext(outputs))
    await asyncio.sleep(0)
    outputs.add(emit(1))
    outputs.deliver()
    outputs.close(Fail(EngineError("later")))
    with pytest.raises(ValueError, match="a bug"):
        await reading


GENERATE = GenerateRequest(
    request_id="b", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=200), deadline_s=5
)


def says(*parts: bytes) -> web.Application:
    """A node whose answer has these parts."""

    async def answers(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        return response

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answers)
    return app


def frame(token: int, index: int = 0) -> bytes:
    return pack_frame(msgspec.msgpack.encode(TokenDelta(index=index, token_ids=[token])))


def frames(first: int, count: int) -> bytes:
    return b"".join(map(frame, range(first, first + count)))


@pytest.fixture
async def client() -> AsyncIterator[HttpNodeClient]:
    client = HttpNodeClient(connect_timeout_s=20.0, max_connections=10)
    yield client
    await client.aclose()


async def read(client: HttpNodeClient, url: str, reader: Collected, gap_s: float = 20.0) -> None:
    await client.generate(url, GENERATE, reader, first_s=20.0, gap_s=gap_s)


async def test_a_node_that_sends_much_at_once_is_not_taken_in_one_turn(client: HttpNodeClient) -> None:
    at_once = [0]

    def takes(delta: TokenDelta) -> bool:
        asyncio.get_running_loop().call_soon(turn)
        at_once[-1] += 1
        return True

    def turn() -> None:
        at_once.append(0)

    reader = Collected(takes)
    async with serve(says(frames(0, 1), frames(1, 200))) as url:
        await read(client, url, reader)
    assert reader.token_ids == list(range(201)) and max(at_once) <= MAX_TAKEN


async def test_a_reader_that_takes_no_more_for_now_gets_what_follows_in_order(client: HttpNodeClient) -> None:
    reader = Collected(lambda delta: bool(delta.token_ids[0] % 3))
    async with serve(says(*(frames(first, 5) for first in range(0, 50, 5)))) as url:
        await read(client, url, reader)
    assert reader.token_ids == list(range(50)) and reader.waits == 17


async def test_a_reader_that_wants_no_more_ends_the_call(client: HttpNodeClient) -> None:
    class Sated(Collected):
        async def ready(self) -> bool:
            return False

    reader = Sated(lambda delta: delta.token_ids[0] < 7)
    async with serve(says(frames(0, 5), frames(5, 40), b"\xff" * 8)) as url:
        await read(client, url, reader)
    assert reader.token_ids == list(range(8)) and " 0 calls" in repr(client)


async def test_what_a_reader_raises_ends_the_call(client: HttpNodeClient) -> None:
    def takes(delta: TokenDelta) -> bool:
        raise EngineError("broke the protocol")

    async with serve(says(frames(0, 1), frames(1, 1))) as url:
        with pytest.raises(EngineError, match="broke the protocol"):
            await read(client, url, Collected(takes))
        assert " 0 calls" in repr(client)


async def test_a_node_that_says_less_than_a_delta_is_late_however_often(client: HttpNodeClient) -> None:
    """Each part of a frame comes in time, and no frame does."""
    reader = Collected()
    async with serve(says(frame(1), b"\xff\x00\x00\x00", *[b"x"] * 100)) as url:
        with pytest.raises(DeadlineExceededError):
            await read(client, url, reader, gap_s=0.2)
    assert reader.token_ids == [1]


class OverSockets(FakeNodes):
    """Decode legs by HTTP, so that no task of ours runs while a delta is taken. `at`: where each node is served."""

    def __init__(self, nodes: list[FakeNode], client: HttpNodeClient, at: dict[str, str]) -> None:
        super().__init__(nodes)
        self._client, self._at = client, at

    async def generate(
        self, url: str, request: GenerateRequest, reader: DeltaReader, *, first_s: float, gap_s: float
    ) -> None:
        where = self._at[self.by_url[url].id]
        await self._client.generate(where, request, reader, first_s=first_s, gap_s=gap_s)


async def test_a_leg_that_breaks_the_protocol_goes_on_elsewhere(client: HttpNodeClient) -> None:
    nodes = [FakeNode("d0", Role.DECODER), FakeNode("d1", Role.DECODER)]
    prompt = list(range(40))
    tokens = expected(prompt, 4)
    at: dict[str, str] = {}
    rig = await make_rig(OverSockets(nodes, client, at), limits=IMPATIENT)
    run = rig.dispatcher.open(RequestSpec("r", prompt, SamplingParams(max_tokens=4, temperature=0)))
    assert run.record.route is not None
    liar = run.record.route.decoder
    (honest,) = [node for node in nodes if node.id != liar]
    lies = says(frame(tokens[0]), frame(tokens[1], index=7))
    async with serve(lies) as at[liar], serve(node_app(honest)) as at[honest.id], run:
        assert [token async for one in run for token in one.token_ids] == tokens
    assert [leg.node for leg in run.record.legs] == [liar, honest.id]
    assert "broke the protocol" in (run.record.legs[0].error or "")
    assert rig.cluster.nodes[liar].breaker._failures == 1
