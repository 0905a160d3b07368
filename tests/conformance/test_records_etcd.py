"""What records in etcd do beyond what all kinds do: members that die or hang, compaction, TLS, users, lost answers."""

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support.etcd_server import EtcdServer, etcd_server, needs_etcd
from support.records_rigs import running

from kvcore.clock import SystemClock
from kvcore.config.records import EtcdRecordsConfig
from kvcore.errors import ConfigError, NotLeaderError, PayloadTooLargeError, RecordsUnavailableError
from metadata_server.records.base import ABSENT, Guard, PutOutcome, RecordsUpdate
from metadata_server.records.etcd.access import etcd_access
from metadata_server.records.etcd.records import EtcdRecords, open_etcd
from metadata_server.records.limits import RecordsLimits

pytestmark = list(needs_etcd)


@pytest.fixture(scope="module")
def one() -> Iterator[EtcdServer]:
    with etcd_server() as server:
        yield server


@pytest.fixture(scope="module")
def three() -> Iterator[EtcdServer]:
    with etcd_server(3) as server:
        yield server


@contextlib.asynccontextmanager
async def opened(
    server: EtcdServer, cluster: str, limits: RecordsLimits = RecordsLimits(), **section: object
) -> AsyncIterator[EtcdRecords]:
    config = EtcdRecordsConfig(**{"endpoints": server.urls, "timeout_s": 5.0, **section})  # type: ignore[arg-type]
    async with running(await open_etcd(etcd_access(config, cluster), SystemClock(), limits)) as records:
        assert isinstance(records, EtcdRecords)
        yield records


def shown(update: RecordsUpdate) -> tuple[bool, list[tuple[str, bytes]]]:
    return update.reset, [(record.key, record.value) for record in update.records]


async def test_a_cluster_sees_its_own_records_and_what_a_hand_has_written(one):
    async with opened(one, "c1") as ours, opened(one, "c10") as others:
        await others.put("a", b"theirs")
        await ours.put("a", b"ours\nof two lines")
        one.ctl("put", "kvferry/c1/b", "by hand")
        assert [(record.key, record.value) for record in (await ours.listing("")).records] == [
            ("a", b"ours\nof two lines"),
            ("b", b"by hand"),
        ]
        reply = await ours.put("b", b"2", expect=(await ours.get("b")).revision)
        assert reply.outcome is PutOutcome.WRITTEN
    assert one.ctl("get", "--print-value-only", "kvferry/c1/a").startswith("ours\nof two lines\n")


async def test_a_listing_of_many_pages_is_of_one_revision_whatever_is_written_or_compacted_meanwhile(one):
    limits = RecordsLimits(etcd_page=7)
    async with opened(one, "pages", limits) as records:
        for at in range(30):
            await records.put(f"k{at:02}", b"0")

        async def disturb() -> None:
            for turn in range(1, 6):
                first, last = await records.put("k00", b"%d" % turn), await records.put("k29", b"%d" % turn)
                assert last.record.revision == first.record.revision + 1
                await asyncio.to_thread(one.ctl, "compact", str(last.record.revision))

        disturbing = asyncio.ensure_future(disturb())
        while not disturbing.done():
            listing = await records.listing("k")
            assert [record.key for record in listing.records] == [f"k{at:02}" for at in range(30)]
            assert int(listing.records[0].value) - int(listing.records[-1].value) in (0, 1)
        await disturbing


async def test_a_watch_whose_revision_was_compacted_is_given_everything_again(one, monkeypatch):
    async with opened(one, "compacted") as records:
        await records.put("a", b"1")
        whole = records.listing
        listed = 0

        async def compacted_behind(prefix: str):  # between the listing and the watch from it
            nonlocal listed
            found = await whole(prefix)
            listed += 1
            if listed == 1:
                await records.put("a", b"2")
                revision = (await records.put("a", b"3")).record.revision
                one.ctl("compact", str(revision))
            return found

        monkeypatch.setattr(records, "listing", compacted_behind)
        watch = records.watch("")
        async with asyncio.timeout(60):
            assert shown(await anext(watch)) == (True, [("a", b"1")])
            assert shown(await anext(watch)) == (True, [("a", b"3")])
            await records.put("b", b"4")
            assert shown(await anext(watch)) == (False, [("b", b"4")])
        await watch.aclose()


async def test_a_value_that_etcd_does_not_take_is_too_large_and_not_written(one):
    async with opened(one, "large", RecordsLimits(max_value_bytes=8 << 20)) as records:
        with pytest.raises(PayloadTooLargeError, match="max-request-bytes"):
            await records.put("a", bytes(2 << 20))
        assert await records.get("a") is None


# --- answers that are lost ---------------------------------------------------------------------------------------


class LostAnswers:
    """Loses the next answers of transactions: before (`drop`) or after (`done`) etcd has done what it was asked."""

    def __init__(self, records: EtcdRecords) -> None:
        self.plan: list[str] = []
        self._whole = records._members.once
        records._members.once = self  # type: ignore[method-assign, assignment]

    async def __call__(self, call, timeout_s=None):  # type: ignore[no-untyped-def]
        from metadata_server.records.etcd.members import UnansweredError

        step = self.plan.pop(0) if self.plan and timeout_s is None else ""  # reads give a time
        if step == "drop":
            raise UnansweredError("lost on its way")
        reply = await self._whole(call, timeout_s)
        if step:
            raise UnansweredError("answer lost")
        return reply


@pytest.mark.parametrize("plan", [["drop"], ["done"], ["drop", "drop", "done"], ["done", "done"]])
@pytest.mark.parametrize("expect", ["none", "absent", "revision"])
async def test_a_write_whose_answer_is_lost_is_done_once_and_answered(one, plan, expect):
    async with opened(one, f"lost-{expect}-{'-'.join(plan)}") as records:
        before = await records.put("a", b"0") if expect != "absent" else None
        lost = LostAnswers(records)
        lost.plan = list(plan)
        expected = {"none": None, "absent": ABSENT, "revision": before.record.revision if before else 0}[expect]
        reply = await records.put("a", b"1", expect=expected)
        assert reply.outcome is PutOutcome.WRITTEN and await records.get("a") == reply.record
        assert reply.record.revision == (await records.listing("")).revision, "it was written twice"
        lost.plan = list(plan)
        if plan[0] == "drop" and plan[-1] == "drop":
            assert await records.delete("a", expect=reply.record.revision)
        else:
            with pytest.raises(RecordsUnavailableError, match="whether it removed a is not known"):
                await records.delete("a", expect=reply.record.revision)
        assert await records.get("a") is None
        await records.put("a", b"2")
        lost.plan = list(plan)
        assert await records.delete("a") and await records.get("a") is None


async def test_a_lost_write_that_another_has_written_over_is_not_said_to_be_a_conflict(one):
    async with opened(one, "over") as records:
        lost = LostAnswers(records)
        first = await records.put("a", b"0")

        async def another(key: str):
            await EtcdRecords.put(records, key, b"another's")

        whole = records._range

        async def read_back(key: bytes):
            if lost.plan == ["then"]:
                lost.plan = []
                await another("a")
            return await whole(key)

        records._range = read_back  # type: ignore[method-assign]
        lost.plan = ["done", "then"]
        with pytest.raises(RecordsUnavailableError, match="whether it wrote a is not known"):
            await records.put("a", b"1", expect=first.record.revision)
        lost.plan = ["done", "then"]
        assert (await records.put("a", b"2")).record.value == b"2", "what expects nothing is written again"


# --- members -----------------------------------------------------------------------------------------------------


async def write_on(records: EtcdRecords, answered: list[int], stop: asyncio.Event) -> None:
    while not stop.is_set():
        number = len(answered)
        try:
            reply = await records.put(f"n/{number:06}", b"%d" % number, expect=ABSENT)
        except RecordsUnavailableError:
            found = await asyncio.wait_for(held(records, f"n/{number:06}"), 60)
            if not found:
                continue
        else:
            assert reply.outcome is PutOutcome.WRITTEN
        answered.append(number)


async def held(records: EtcdRecords, key: str) -> bool:
    while True:
        with contextlib.suppress(RecordsUnavailableError):
            return await records.get(key) is not None


async def test_its_leader_is_killed_and_hangs_and_no_answered_write_is_lost_and_watches_go_on(three):
    async with opened(three, "ha", timeout_s=4.0) as records:
        answered, stop = list[int](), asyncio.Event()
        known: dict[str, bytes] = {}

        async def follow() -> None:
            async for update in records.watch("n/"):
                if update.reset:
                    known.clear()
                known.update({record.key: record.value for record in update.records})

        following = asyncio.ensure_future(follow())
        writing = asyncio.ensure_future(write_on(records, answered, stop))
        for how in ("kill", "freeze", "kill"):
            await more(answered, 20)
            victim = await asyncio.to_thread(three.leader)
            victim.stop() if how == "kill" else victim.freeze()
            await more(answered, 20)
            victim.start() if how == "kill" else victim.thaw()
            await asyncio.to_thread(three.wait_ready)
        stop.set()
        await writing
        names = [record.key for record in (await records.listing("n/")).records]
        assert names == [f"n/{number:06}" for number in answered]
        async with asyncio.timeout(30.0):
            while len(known) < len(names):  # noqa: ASYNC110 - what a watch has told: nobody could set an event for it
                await asyncio.sleep(0.01)
        following.cancel()
        assert sorted(known) == names


async def more(answered: list[int], count: int) -> None:
    wanted = len(answered) + count
    async with asyncio.timeout(30.0):
        while len(answered) < wanted:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_lease_outlives_the_leader_of_etcd_and_a_guard_holds_over_it(three):
    async with opened(three, "guard") as records:
        lease = await records.grant(3.0)
        reply = await records.put("leader", b"me", expect=ABSENT, lease=lease)
        guard = Guard("leader", reply.record.revision)
        victim = await asyncio.to_thread(three.leader)
        victim.stop()
        async with asyncio.timeout(30.0):
            while True:
                with contextlib.suppress(RecordsUnavailableError):
                    assert await records.renew(lease)
                    break
        assert (await records.put("a", b"1", guard=guard)).outcome is PutOutcome.WRITTEN
        victim.start()
        await asyncio.to_thread(three.wait_ready)
        await records.revoke(lease)
        with pytest.raises(NotLeaderError):
            await records.put("a", b"2", guard=guard)


async def test_without_a_majority_calls_end_in_time_and_it_goes_on_when_it_is_back(three):
    async with opened(three, "minority", timeout_s=1.0) as records:
        await records.put("a", b"1")
        for victim in three.members[:2]:
            victim.stop()
        for call in (records.get("a"), records.put("a", b"2"), records.grant(10.0), records.listing("")):
            async with asyncio.timeout(60):
                with pytest.raises(RecordsUnavailableError):
                    await call
        for victim in three.members[:2]:
            victim.start()
        await asyncio.to_thread(three.wait_ready)
        assert await asyncio.wait_for(held(records, "a"), 60)


# --- who may -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """`ca`, `server` and `client`, each with a key."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], check=True, capture_output=True, cwd=folder)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-days", "2", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost")
    for name in ("server", "client"):
        openssl("req", *curve, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "names")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    return folder


async def test_over_tls_with_certificates_and_a_user(certificates, monkeypatch, tmp_path):
    here = {
        name: str(certificates / name) for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    }
    args = ("--cert-file", here["server.pem"], "--key-file", here["server.key"])
    args += ("--client-cert-auth", "--trusted-ca-file", here["ca.pem"])
    ctl = ("--cacert", here["ca.pem"], "--cert", here["client.pem"], "--key", here["client.key"])
    tls = {"ca": here["ca.pem"], "cert": here["client.pem"], "key": here["client.key"], "timeout_s": 5.0}
    with etcd_server(scheme="https", args=args, ctl=ctl) as server:
        async with opened(server, "tls", **tls) as records:
            await records.put("a", b"1")
        with pytest.raises(TimeoutError):  # it is waited for: a server that hangs up may be one that starts
            async with asyncio.timeout(1.0), opened(server, "tls", ca=here["ca.pem"], timeout_s=0.3):
                pass
        server.ctl("user", "add", "root:secret")
        server.ctl("user", "grant-role", "root", "root")
        server.ctl("user", "add", "kv:word")
        server.ctl("role", "add", "kv")
        server.ctl("role", "grant-permission", "kv", "--prefix=true", "readwrite", "kvferry/tls/")
        server.ctl("user", "grant-role", "kv", "kv")
        server.ctl("auth", "enable")
        (tmp_path / "password").write_text("word\n")
        user = {**tls, "user": "kv", "password_file": str(tmp_path / "password")}
        async with opened(server, "tls", **user) as records:
            assert (await records.get("a")).value == b"1"
            lease = await records.grant(10.0)
            assert await records.renew(lease)
            watch = records.watch("")
            assert (await anext(watch)).reset
            await watch.aclose()
            server.members[0].stop()
            server.members[0].start()  # it has forgotten all tokens
            async with asyncio.timeout(30.0):
                while True:
                    with contextlib.suppress(RecordsUnavailableError):
                        await records.put("a", b"2", lease=lease)
                        break
        with pytest.raises(ConfigError, match="refuses user kv"):
            async with opened(server, "another", **user):
                pass
        monkeypatch.setenv("KVFERRY_ETCD_PASSWORD", "wrong")
        with pytest.raises(ConfigError, match="does not take user kv"):
            async with opened(server, "tls", **{**tls, "user": "kv"}):
                pass
        with pytest.raises(ConfigError, match=r"refuses nobody; set metadata_server\.records\.user"):
            async with opened(server, "tls", **tls):
                pass
