"""A cluster of real processes whose frames over TCP have MACs: KV moves between its nodes, and their /metrics know who
came without."""

import contextlib
import random
import socket

import pytest
from support.attacks import secret_override
from support.cluster import cluster

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from kvcore.trust.opening import open_trust, trust_source
from nodeapi.sampling import SamplingParams
from transfer.greeting import InitiatorGreeting, greeting_keys
from transfer.tcp import wire
from transfer.tcp.sockets import split_address

pytestmark = pytest.mark.slow


async def test_kv_moves_between_nodes_in_frames_with_macs_and_a_peer_without_is_refused(tmp_path):
    overrides = [secret_override(tmp_path), "transport.integrity=frames"]
    async with cluster(tmp_path, prefillers=1, decoders=1, transport="tcp", overrides=overrides) as subject:
        draw = random.Random(4)
        prompt = [draw.randrange(1, 50_000) for _ in range(400)]
        body = await subject.complete(prompt, max_tokens=8, temperature=0, ignore_eos=True, return_token_ids=True)
        sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        assert isinstance(subject.config.engine, SimEngineConfig)
        assert body["choices"][0]["token_ids"] == expected_tokens(subject.config.engine, prompt, sampling)[0]
        record = await subject.explain(body["id"])
        moved = [one for leg in record["legs"] for one in leg.get("moved", [])]
        assert {one["transport"] for one in moved} == {"tcp"}

        (segment,) = [one.segment for one in (await subject.stats()).segments if one.segment.node_id == "decode-0"]
        trust = open_trust(trust_source(subject.config, "decode-0"))
        hello = InitiatorGreeting(greeting_keys(trust), "tcp", segment.id).hello()
        with socket.create_connection(split_address(segment.addresses["tcp"]), timeout=20) as sock:
            sock.sendall(wire.pack_greeting(wire.FrameKind.PROVEN_HELLO, hello))
            said = b""
            with contextlib.suppress(OSError):
                while part := sock.recv(4096):
                    said += part
        assert b"transport.integrity" in said
        node = subject.config.nodes["decode-0"]
        async with subject.session.get(f"http://{node.host}:{node.port}/metrics") as reply:
            text = await reply.text()
        assert 'kvferry_node_transfer_refused_total{reason="proof",transport="tcp"} 1.0' in text
        assert "frames_forged" not in text or 'name="frames_forged"} 0.0' in text
