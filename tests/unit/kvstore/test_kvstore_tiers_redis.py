"""What a Redis does that no other tier does: full, evicting, asking for a password, a replica, behind TLS, slow."""

import re
import socket
import subprocess
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.garbage_server import GARBAGE, GarbageServer
from support.ports import free_ports
from support.redis_server import redis_server, with_redis
from support.tier_rigs import FINGERPRINT, chunk_of, content, name_of, room_for

from kvstore.tiers.base import TierOutcome
from kvstore.tiers.limits import RedisLimits
from kvstore.tiers.places.redis_url import parse_server
from kvstore.tiers.redis import RedisTier
from kvstore.tiers.redis_parts import part_key
from kvstore.tiers.resp import RespConnection, RespRefusal, command
from kvstore.tiers.resp_client import RespClient
from transfer.blocking import BatchDeadline

OK, MISSING, AWAY = TierOutcome.OK, TierOutcome.MISSING, TierOutcome.UNAVAILABLE
CALL_S = 20.0
PART = 100_000
LIMITS = RedisLimits(part_bytes=PART, group_bytes=1 << 20)


@asynccontextmanager
async def tier_at(url: str, environ: Mapping[str, str] = {}) -> AsyncIterator[RedisTier]:
    server = parse_server(url, environ)
    tier = RedisTier(RespClient(server, 2), RespClient(server, 1), LIMITS)
    try:
        yield tier
    finally:
        await tier.aclose()


@with_redis
async def test_a_full_server_refuses_and_commits_nothing_of_what_did_not_fit():
    with redis_server("--maxmemory", "6mb", "--maxmemory-policy", "noeviction") as server:
        async with tier_at(server.url) as tier:
            small, large = chunk_of(name_of(1), 3 * PART), chunk_of(name_of(2), 100 * PART)
            assert await tier.save([small, large], timeout_s=CALL_S) == [OK, TierOutcome.FULL]
            assert "OOM" in (tier.stats().problem or "")
            assert await tier.find([small.name, large.name], timeout_s=CALL_S) == [True, False]
            assert tier.stats().problem is None, "finding is no matter of room"
            back = room_for(small)
            assert await tier.load([back], timeout_s=CALL_S) == [OK] and content(back) == content(small)


@with_redis
async def test_a_server_that_evicts_gives_whole_chunks_or_none_and_takes_them_again():
    with redis_server("--maxmemory", "6mb") as server:
        async with tier_at(server.url) as tier:
            chunks = [chunk_of(name_of(number), 10 * PART + number) for number in range(12)]
            assert await tier.save(chunks, timeout_s=CALL_S) == [OK] * 12
            backs = [room_for(chunk) for chunk in chunks]
            outcomes = await tier.load(backs, timeout_s=CALL_S)
            assert set(outcomes) <= {OK, MISSING} and MISSING in outcomes
            for chunk, back, outcome in zip(chunks, backs, outcomes, strict=True):
                assert outcome is MISSING or content(back) == content(chunk)


@with_redis
async def test_a_chunk_that_lost_a_part_is_a_miss_and_is_written_anew():
    with redis_server() as server:
        async with tier_at(server.url) as tier:
            chunk = chunk_of(name_of(1), 3 * PART)
            for part in range(4):
                assert await tier.save([chunk], timeout_s=CALL_S) == [OK]
                assert server.ask(b"DEL", part_key(chunk.name, part)) == 1
                assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [MISSING]
            server.ask(b"SET", part_key(chunk.name, 3), b"short")
            await tier.save([chunk], timeout_s=CALL_S)
            server.ask(b"SET", part_key(chunk.name, 1), b"short")
            assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [TierOutcome.DAMAGED]
            server.ask(b"SET", part_key(chunk.name, 0), b"another's value, at our key")
            assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [TierOutcome.DAMAGED]


@with_redis
async def test_a_chunk_whose_later_parts_were_refused_is_not_committed():
    may_write_first_parts = ("--user", "default", "on", "nopass", "+@all", "%R~*", "%W~*:0")
    with redis_server(*may_write_first_parts) as server:
        async with tier_at(server.url) as tier:
            small, large = chunk_of(name_of(1), 1000), chunk_of(name_of(2), 3 * PART)
            assert await tier.save([large, small], timeout_s=CALL_S) == [AWAY, OK]
            assert "NOPERM" in (tier.stats().problem or "")
            assert await tier.find([large.name, small.name], timeout_s=CALL_S) == [False, True]


@with_redis
async def test_a_ttl_is_each_parts_and_removal_leaves_nothing():
    with redis_server() as server:
        async with tier_at(server.url) as tier:
            short, long = chunk_of(name_of(1), 2 * PART), chunk_of(name_of(2), 2 * PART)
            assert await tier.save([short], ttl_s=0.05, timeout_s=CALL_S) == [OK]
            assert await tier.save([long], ttl_s=900.0, timeout_s=CALL_S) == [OK]
            for part in range(3):
                left_ms = server.ask(b"PTTL", part_key(long.name, part))
                assert isinstance(left_ms, int) and 600_000 < left_ms <= 900_000
            while server.ask(b"EXISTS", part_key(short.name, 0)) == 1:
                pass
            assert await tier.load([room_for(short), room_for(long)], timeout_s=CALL_S) == [MISSING, OK]
            await tier.save([short], timeout_s=CALL_S)
            assert server.ask(b"PTTL", part_key(short.name, 2)) == -1
            await tier.remove([short.name, long.name, name_of(3)], timeout_s=CALL_S)
            assert server.ask(b"DBSIZE") == 0


@with_redis
async def test_a_password_comes_from_the_url_or_the_environment_and_is_asked_for_by_name():
    with redis_server("--requirepass", "sesame") as server:
        address, chunk = server.url.removeprefix("redis://"), chunk_of(name_of(1), 1000)
        for url, environ, words in (
            (server.url, {}, "NOAUTH.*KVFERRY_REDIS_PASSWORD"),
            (f"redis://:wrong@{address}", {}, "WRONGPASS"),
            (f"{server.url}/99", {"REDIS_PASSWORD": "sesame"}, "DB index is out of range"),
        ):
            async with tier_at(url, environ) as tier:
                assert await tier.save([chunk], timeout_s=CALL_S) == [AWAY]
                assert re.search(words, problem := tier.stats().problem or "") and "wrong" not in problem
        for url, environ in (
            (f"redis://:sesame@{address}", {}),
            (f"redis://default:sesame@{address}/3", {}),
            (server.url, {"KVFERRY_REDIS_PASSWORD": "sesame"}),
        ):
            async with tier_at(url, environ) as tier:
                assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [MISSING]
                assert await tier.save([chunk], timeout_s=CALL_S) == [OK] and tier.stats().problem is None
                await tier.remove([chunk.name], timeout_s=CALL_S)


@with_redis
async def test_a_replica_is_read_and_says_why_it_takes_nothing():
    with redis_server("--replicaof", "127.0.0.1", "1") as server:
        async with tier_at(server.url) as tier:
            chunk = chunk_of(name_of(1), 1000)
            assert await tier.save([chunk], timeout_s=CALL_S) == [AWAY]
            assert re.search("READONLY.*name its primary", tier.stats().problem or "")
            assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [MISSING]


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A key, and a certificate for 127.0.0.1."""
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    how = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    where = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(["openssl", *how.split(), *where], check=True, capture_output=True)
    return key, certificate


@with_redis
async def test_over_tls_only_a_certificate_that_is_trusted_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    key, certificate = self_signed(tmp_path)
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key), "--tls-auth-clients", "no")
    with redis_server(*files, tls_port=True) as server:
        url = server.url.replace("redis:", "rediss:")
        chunk = chunk_of(name_of(1), 5 * PART, parts=3)
        async with tier_at(url) as tier:
            assert await tier.save([chunk], timeout_s=CALL_S) == [AWAY]
            assert "certificate" in (tier.stats().problem or "").lower()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        async with tier_at(url) as tier:
            assert await tier.save([chunk], timeout_s=CALL_S) == [OK]
            back = room_for(chunk)
            assert await tier.load([back], timeout_s=CALL_S) == [OK] and content(back) == content(chunk)


@with_redis
async def test_what_lies_in_the_server_is_what_the_page_on_formats_says():
    with redis_server() as server:
        own = parse_server(server.url, {})
        tier = RedisTier(RespClient(own, 2), RespClient(own, 1))
        chunk, part = chunk_of(name_of(1), 5 << 20, parts=2), 4_190_208
        assert await tier.save([chunk], timeout_s=CALL_S) == [OK]
        key = f"kvf1:{{{chunk.name.text.replace('/', '-')}}}:"
        for number, size in ((0, 16 + part), (1, chunk.num_bytes - part)):
            assert server.ask(b"STRLEN", f"{key}{number}".encode()) == size
        head = server.ask(b"GETRANGE", f"{key}0".encode(), b"0", b"143")
        assert head == b"KVFPART0" + chunk.num_bytes.to_bytes(8, "little") + chunk.header()
        assert server.ask(b"DBSIZE") == 2
        await tier.aclose()


async def test_no_more_answers_are_asked_for_than_the_limit_while_none_is_read():
    ours, theirs = socket.socketpair()
    chunk, most = chunk_of(name_of(1), 9 * PART), 0
    stored = content(chunk)
    values = [stored[at : at + PART] for at in range(0, len(stored), PART)]
    values[0] = b"KVFPART0" + len(stored).to_bytes(8, "little") + values[0]

    def serve() -> None:
        nonlocal most
        asked = 0
        for answered, value in enumerate(values):
            while asked < min(answered + LIMITS.gets_under_way, len(values)):
                asked += theirs.recv(65536).count(b"GET\r\n")
            most = max(most, asked - answered)
            theirs.sendall(b"$%d\r\n%b\r\n" % (len(value), value))

    with ours, theirs:
        thread = threading.Thread(target=serve)
        thread.start()
        outcomes, back = [AWAY], room_for(chunk)
        server = parse_server("redis://127.0.0.1:1", {})
        tier = RedisTier(RespClient(server, 1), RespClient(server, 1), LIMITS)
        tier._load_share(RespConnection(ours, BatchDeadline(10.0)), [(0, back)], outcomes)
        thread.join()
        await tier.aclose()
    assert outcomes == [OK] and content(back) == stored and most == LIMITS.gets_under_way


@with_redis
async def test_generations_of_a_server_with_others_keys_are_counted_past_many_pages():
    with redis_server() as server, server.connection() as connection:
        words = [(b"SET", b"theirs:%d" % number, b"x") for number in range(5000)]
        words += [(b"SET", b"kvf1:{no fingerprint}:0", b"x"), (b"LPUSH", part_key(name_of(7), 0), b"no string")]
        connection.send([command(*line) for line in words], replies=len(words))
        assert all(not isinstance(connection.reply(), RespRefusal) for _ in words)
        async with tier_at(server.url) as tier:
            chunks = [chunk_of(name_of(number), 2 * PART) for number in range(3)]
            await tier.save(chunks, timeout_s=CALL_S)
            server.ask(b"DEL", part_key(chunks[0].name, 0))
            listed = await tier.generations(timeout_s=CALL_S)
            assert [(one.num_chunks, one.num_bytes) for one in listed.found] == [(2, 5 * PART + 3 * 128 + 2 * 16)]
            assert (await tier.clear([FINGERPRINT], timeout_s=CALL_S)).incomplete == ""
            assert server.ask(b"DBSIZE") == 5001, "the part without its chunk went too, others' keys stay"


@with_redis
async def test_a_server_that_may_not_be_scanned_says_so_and_is_in_use_all_the_same():
    with redis_server("--user", "default", "on", "nopass", "+@all", "-scan", "~*") as server:
        async with tier_at(server.url) as tier:
            chunk = chunk_of(name_of(1), 1000)
            assert await tier.save([chunk], timeout_s=CALL_S) == [OK]
            listed = await tier.generations(timeout_s=CALL_S)
            assert listed.found == () and "NOPERM" in listed.incomplete
            cleared = await tier.clear([FINGERPRINT], own=[], timeout_s=CALL_S)
            assert cleared.num_chunks == 0 and "NOPERM" in cleared.incomplete
            assert tier.stats().problem is None and await tier.load([room_for(chunk)], timeout_s=CALL_S) == [OK]


class Paged:
    """A server of endless keys: every page has one chunk and a cursor that goes on. `late`: pages before it stalls."""

    def __init__(self, late: int) -> None:
        self.pages, self.late, self.silent = 0, late, threading.Event()

    def serve(self, listener: socket.socket) -> None:
        sock, _ = listener.accept()
        with sock, sock.makefile("rb") as stream:
            while (line := stream.readline()).startswith(b"*"):
                words = [stream.read(int(stream.readline()[1:]) + 2)[:-2] for _ in range(int(line[1:]))]
                sock.sendall(self.answer(words))

    def answer(self, words: list[bytes]) -> bytes:
        if words[0] != b"SCAN":
            return {b"PING": b"+PONG\r\n", b"STRLEN": b":100\r\n", b"UNLINK": b":1\r\n"}.get(words[0], b"$-1\r\n")
        if b"live" in words[3]:
            return b"*2\r\n$1\r\n0\r\n*0\r\n"
        self.pages += 1
        if self.pages > self.late:
            self.silent.wait(60)
        key = part_key(name_of(self.pages), 0)
        return b"*2\r\n$1\r\n7\r\n*1\r\n$%d\r\n%b\r\n" % (len(key), key)


@pytest.mark.parametrize("late", [3, 1 << 60])
async def test_a_scan_without_end_stops_in_time_and_tells_what_it_saw(late):
    paged = Paged(late)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = threading.Thread(target=paged.serve, args=(listener,))
        serving.start()
        async with tier_at(f"redis://127.0.0.1:{listener.getsockname()[1]}") as tier:
            listed = await tier.generations(timeout_s=0.4)
            paged.silent.set()
        serving.join()
    (one,) = listed.found
    assert paged.pages - 1 <= one.num_chunks <= paged.pages and one.num_bytes == 100 * one.num_chunks
    assert "time" in listed.incomplete


@pytest.mark.slow
async def test_of_a_server_that_speaks_nonsense_nothing_is_believed():
    (port,) = free_ports(1)
    chunk = chunk_of(name_of(1), 2 * PART)
    for kind in GARBAGE:
        async with GarbageServer(port, [kind]) as server, tier_at(f"redis://127.0.0.1:{port}") as tier:
            for timeout_s in (0.05, 0.01, 0.02):
                assert await tier.load([room_for(chunk)], timeout_s=timeout_s) != [OK], kind
                assert await tier.save([chunk], timeout_s=timeout_s) != [OK], kind
                await tier.find([chunk.name], timeout_s=timeout_s)
                await tier.remove([chunk.name], timeout_s=timeout_s)
            assert server.answered, kind
