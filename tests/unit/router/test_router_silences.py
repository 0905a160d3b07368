"""Streams that stand still are kept open by comments, and those that go on get none."""

import asyncio
import json

import pytest
from support.http_wire import Wire, connected
from support.router_fakes import FakeNode, FakeNodes, expected, make_rig, until
from support.sim_loop import run_sim

from kvcore.types import Role
from router.api.limits import ApiLimits
from router.api.silences import Silences
from router.requests.limits import RequestLimits

PROMPT = "hello" * 20
COMMENT = b": nothing new yet\n\n"
BODIES = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": PROMPT}]},
    "/v1/messages": {"messages": [{"role": "user", "content": PROMPT}]},
    "/v1/responses": {"input": PROMPT},
}


class Told:
    silent = False

    def __init__(self) -> None:
        self.at: list[float] = []

    def comment(self, text: bytes) -> None:
        assert text.startswith(b":") and text.endswith(b"\n\n")
        self.at.append(asyncio.get_running_loop().time())


def test_a_stream_is_told_of_after_one_to_two_looks_of_silence_and_not_while_it_goes_on() -> None:
    async def look_at() -> tuple[Told, Told, Told]:
        silences, still, lively, gone = Silences(5.0), Told(), Told(), Told()
        for stream in (still, lively, gone):
            silences.watch(stream)
        silences.leave(gone)
        for _ in range(28):
            await asyncio.sleep(1.0)
            lively.silent = False
        silences.leave(lively)
        silences.leave(still)
        await asyncio.sleep(30.0)
        silences.watch(lively)  # the looks, which had ended, begin again
        await asyncio.sleep(11.0)
        return still, lively, gone

    still, lively, gone = run_sim(look_at)
    assert still.at == [10.0, 15.0, 20.0, 25.0] and gone.at == []
    assert lively.at == [68.0]


def stream(app: object, path: str, **fields: object) -> tuple[object, Wire]:
    protocol, wire, _ = connected(app)
    asks = {"model": "fake-model", "stream": True, "max_tokens": 8, **BODIES[path], **fields}
    if path == "/v1/responses":
        asks["max_output_tokens"] = asks.pop("max_tokens")
    body = json.dumps(asks).encode()
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body))
    protocol.data_received(head + body)
    return protocol, wire


def events(wire: Wire) -> list[bytes]:
    """The body's, comments among them. A chunk of HTTP holds whole ones."""
    parts = wire.sent.split(b"\r\n\r\n", 1)[1].split(b"\r\n")
    return [event for part in parts[1::2] for event in part.split(b"\n\n") if event]


@pytest.mark.parametrize("path", BODIES)
async def test_a_running_stream_that_waits_for_a_node_is_kept_open_and_goes_on(path: str) -> None:
    node = FakeNode("d0", Role.DECODER, die_after=3, stays_dead=True)
    rig = await make_rig(FakeNodes([node]), limits=RequestLimits(patience_s=60.0), api_limits=ApiLimits(look_s=0.02))
    protocol, wire = stream(rig.app, path)
    await until(lambda: wire.sent.count(COMMENT) >= 2)
    node.down, node.die_after = False, None
    await rig.prober.probe()
    await until(lambda: wire.sent.endswith(b"0\r\n\r\n"))
    said = events(wire)
    assert said.count(COMMENT.strip()) >= 2 and rig.log.ok == 1 and rig.log.in_flight == 0
    assert all(event.startswith((b"data: ", b"event: ", b": nothing")) for event in said)
    if path == "/v1/completions":
        bodies = [json.loads(event[6:]) for event in said if event.startswith(b"data: {")]
        text = "".join(body["choices"][0]["text"] for body in bodies if body["choices"])
        assert text.encode() == bytes(expected(list(PROMPT.encode()), 8))
    del protocol


async def test_a_client_that_takes_nothing_is_told_nothing_and_one_without_a_stream_neither() -> None:
    node = FakeNode("d0", Role.DECODER, token_gate=asyncio.Event())
    rig = await make_rig(FakeNodes([node]), api_limits=ApiLimits(look_s=0.01))
    stuck, wire = stream(rig.app, "/v1/completions")
    await until(lambda: wire.sent.count(COMMENT) >= 1)
    stuck.pause_writing()
    whole, silent = stream(rig.app, "/v1/completions", stream=False)
    until_then = wire.sent.count(COMMENT)
    seen, other = stream(rig.app, "/v1/completions")
    await until(lambda: other.sent.count(COMMENT) >= 3)
    assert wire.sent.count(COMMENT) <= until_then + 1 and silent.sent == b""  # one may have been held
    stuck.resume_writing()
    node.token_gate.set()
    await until(lambda: all(one.sent.endswith((b"0\r\n\r\n", b"}")) for one in (wire, silent, other)))
    assert COMMENT not in silent.sent and rig.log.ok == 3
    del whole, seen
