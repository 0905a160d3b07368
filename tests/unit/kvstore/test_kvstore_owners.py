"""Whose chunks they are reaches the metadata server with the reservation, whoever reserves: an engine or a tier."""

import msgspec
import pytest
from support.sim_loop import run_sim
from support.store_fakes import KEYS, SPEC
from support.tier_world import TierWorld, put_into, shared_tier

from kvcore.chunk_keys import chunk_keys, owner_of, root_key
from kvcore.clock import ManualClock
from kvcore.config.schema import StoreConfig
from kvnode.tiers.own_segment import OwnSegment
from kvstore.placement import Placement
from kvstore.store import KVStore
from kvstore.tiers.base import ChunkName
from metadata_server.messages import OWNERS, ReserveReply, ReserveRequest
from nodeapi.messages import PrefillRequest
from transfer.inproc import InprocTransfer


class Server:
    """A metadata server of some version that has no room."""

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol
        self.requests: list[ReserveRequest] = []

    async def reserve(self, request: ReserveRequest, *, timeout_s: float | None = None) -> ReserveReply:
        self.requests.append(request)
        return ReserveReply(outcomes=[])

    async def nodes(self) -> None:
        pass


OWNER = owner_of(b"tenant")


@pytest.mark.parametrize(("protocol", "said"), [(OWNERS, OWNER), (OWNERS - 1, msgspec.UNSET)])
async def test_a_put_says_whose_chunks_it_writes_to_a_server_that_knows_owners(protocol, said):
    server = Server(protocol)
    how = {"metadata": server, "transfer": InprocTransfer({}), "host_id": "h", "clock": ManualClock()}
    store = KVStore(spec=SPEC, node_id="a", incarnation=1, **how)
    async with await store.begin_put(KEYS, prefer_segment=None, timeout_s=5, owner=OWNER):
        pass
    async with await store.begin_put(KEYS, prefer_segment=None, timeout_s=5):
        pass
    assert [request.owner for request in server.requests] == [said, msgspec.UNSET]
    await store.aclose()


async def test_room_for_what_a_tier_has_is_its_tenants():
    server = Server(OWNERS)
    placement = Placement(server, node_id="a", incarnation=1, clock=ManualClock(), config=StoreConfig())
    segment = OwnSegment(memoryview(bytearray(4096)), "a.1", placement)
    names = [ChunkName(SPEC.fingerprint, key) for key in KEYS]
    await segment.give_back(await segment.reserve(names, 1128, owner=OWNER, timeout_s=5))
    await segment.give_back(await segment.reserve(names, 1128, timeout_s=5))
    assert [request.owner for request in server.requests] == [OWNER, msgspec.UNSET]
    await placement.aclose(1)


def test_what_a_leg_has_promoted_is_its_tenants():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        prompt = list(range(2 * SPEC.chunk_tokens + 1))
        async with world.node("a", [tier]) as a:
            put_into(tier, chunk_keys(root_key(SPEC.fingerprint, b"tenant"), prompt, SPEC.chunk_tokens))
            told, segment = [], a.tiers.promoter.loader._segment
            reserve = segment.reserve

            async def telling(names, num_bytes, **how):
                told.append(how["owner"])
                return await reserve(names, num_bytes, **how)

            segment.reserve = telling
            request = PrefillRequest(request_id="r", prompt_token_ids=prompt, cache_salt=b"tenant", deadline_s=9.0)
            _, given = await a.tiers.before_leg(request)
            assert [one.num_chunks for one in given.promoted] == [2] and told == [owner_of(b"tenant")]

    run_sim(main)
