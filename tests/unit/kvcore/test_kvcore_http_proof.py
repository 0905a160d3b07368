"""Proofs of requests: what a server with a secret takes, what it refuses and how it says so."""

import base64
import datetime
import hashlib
import random as random_numbers
import re
import secrets as random

import pytest
from http_message_signatures import HTTPMessageVerifier, HTTPSignatureKeyResolver, algorithms

from kvcore.clock import ManualClock
from kvcore.errors import ProofError
from kvcore.trust.http_proof import DIGEST, INPUT, SIGNATURE, RequestProver, RequestVerifier, check_body, digest_of
from kvcore.trust.keys import KeyLabel
from kvcore.trust.limits import ProofLimits
from kvcore.trust.opening import ClusterTrust
from kvcore.trust.replays import SeenRequests
from kvcore.trust.secrets import Secrets
from metadata_server.index.limits import IndexLimits

OLD, NEW, OTHER = (random.token_bytes(32) for _ in range(3))
HOST, TARGET, BODY = "127.0.0.1:8700", "/v1/match?epoch=a%20b&n=1", b"what is asked"


def trust(*secrets: bytes, cluster: str = "here") -> ClusterTrust:
    return ClusterTrust(cluster, Secrets(secrets or (OLD,)))


class Pair:
    """A client and a server with clocks of their own."""

    def __init__(self, client: ClusterTrust, server: ClusterTrust, limits: ProofLimits = ProofLimits()) -> None:
        self.client_clock, self.server_clock = ManualClock(), ManualClock()
        self.prover = RequestProver(client, self.client_clock)
        self.verifier = RequestVerifier(server, self.server_clock, frozenset({HOST}), limits)

    def request(self, method: str = "POST", host: str = HOST) -> dict[str, str]:
        return {"Host": host, **dict(self.prover.prove(method, host, TARGET, BODY).headers)}

    def refusal(self, headers: dict[str, str], method: str = "POST", target: str = TARGET) -> str:
        with pytest.raises(ProofError) as raised:
            self.verifier.check(method, target, headers)
        return raised.value.message


def test_a_request_of_the_cluster_is_taken_once():
    pair = Pair(trust(), trust())
    headers = pair.request()
    check_body(pair.verifier.check("POST", TARGET, headers), BODY)
    assert "came before" in pair.refusal(headers)
    pair.verifier.check("POST", TARGET, pair.request())


def test_what_changes_nothing_may_come_again():
    pair = Pair(trust(), trust())
    headers = pair.request("GET")
    for _ in range(2):
        pair.verifier.check("GET", TARGET, headers)


@pytest.mark.parametrize(
    ("method", "target", "changed"),
    [
        ("DELETE", TARGET, {}),
        ("POST", "/v1/drop", {}),
        ("POST", TARGET + "0", {}),
        ("POST", TARGET.replace("%20", " "), {}),
        ("POST", TARGET, {"Host": "127.0.0.1:8701"}),
        ("POST", TARGET, {"Content-Digest": "sha-256=:AAAA:"}),
        ("POST", TARGET, {"Signature": "kvferry=:AAAA:"}),
        ("POST", TARGET, {"Signature": "é"}),
        ("POST", TARGET, {"Signature": ""}),
    ],
)
def test_another_method_path_query_host_or_body_needs_another_proof(method, target, changed):
    pair = Pair(trust(), trust())
    assert "proof is wrong" in pair.refusal({**pair.request(), **changed}, method, target)


def test_each_parameter_of_the_proof_is_part_of_it():
    pair = Pair(trust(), trust())
    headers = pair.request()
    later = re.sub(r"created=(\d+)", lambda found: f"created={int(found[1]) + 1}", headers[INPUT])
    assert "proof is wrong" in pair.refusal({**headers, INPUT: later})
    other = headers[INPUT].replace('nonce="', 'nonce="A', 1)
    assert "form" in pair.refusal({**headers, INPUT: other[:-1]})
    nonce = re.sub(r'nonce="..', 'nonce="zz', headers[INPUT])
    assert "proof is wrong" in pair.refusal({**headers, INPUT: nonce})


def test_another_body_is_told():
    pair = Pair(trust(), trust())
    proof = pair.verifier.check("POST", TARGET, pair.request())
    with pytest.raises(ProofError, match="body"):
        check_body(proof, BODY + b"!")


def test_without_a_proof_or_with_another_secret_the_refusal_says_which():
    pair = Pair(trust(OTHER), trust(NEW, OLD))
    assert "no proof" in pair.refusal({"Host": HOST})
    message = pair.refusal(pair.request())
    for known in (OTHER, NEW, OLD):
        assert trust(known).secrets.newest.id.hex() in message
        assert base64.b64encode(known).decode() not in message


def test_another_clusters_proof_by_the_same_secret_is_none():
    pair = Pair(trust(cluster="there"), trust())
    assert "another cluster" in pair.refusal(pair.request())


def test_a_request_for_another_server_is_refused_though_it_is_proved():
    pair = Pair(trust(), trust())
    assert "made for 10.0.0.1:9" in pair.refusal(pair.request(host="10.0.0.1:9"))


@pytest.mark.parametrize(("ahead_s", "says"), [(-31, "31 s ago"), (31, "31 s from now")])
def test_clocks_that_are_apart_are_named(ahead_s, says):
    pair = Pair(trust(), trust())
    ahead = pair.client_clock if ahead_s > 0 else pair.server_clock
    ahead.advance(abs(ahead_s))
    message = pair.refusal(pair.request("GET"), "GET")
    assert says in message
    assert "set the clocks" in message


def test_clocks_may_be_a_little_apart():
    pair = Pair(trust(), trust())
    pair.client_clock.advance(30)
    pair.verifier.check("POST", TARGET, pair.request())


def started_anew(pair: Pair) -> None:
    """The pair's server: it remembers nothing."""
    pair.verifier = RequestVerifier(trust(), pair.server_clock, frozenset({HOST}))


def asked_again(pair: Pair) -> dict[str, str]:
    """What the pair's client sends when its request is refused."""
    refused = pair.prover.prove("POST", HOST, TARGET, BODY)
    assert pair.prover.learn(HOST, refused, pair.verifier.wanted)
    return pair.request()


def test_a_request_from_before_the_servers_start_is_refused_for_it_may_have_come_already():
    pair = Pair(trust(), trust())
    pair.server_clock.advance(5)
    headers = pair.request()
    started_anew(pair)
    assert "before this server started" in pair.refusal(headers)
    pair.verifier.check("GET", TARGET, pair.request("GET"))


@pytest.mark.parametrize("behind_s", [0.001, 1, 29])
def test_a_client_whose_clock_is_behind_is_refused_once_after_a_start_and_not_for_as_long_as_it_is_behind(behind_s):
    pair = Pair(trust(), trust())
    pair.server_clock.advance(behind_s)
    started_anew(pair)
    heard = pair.request()
    assert "before this server started" in pair.refusal(heard)
    headers = asked_again(pair)
    pair.verifier.check("POST", TARGET, headers)
    pair.verifier.check("POST", TARGET, pair.request())
    assert "came before" in pair.refusal(headers)
    assert "before this server started" in pair.refusal(heard), "this one may have been taken by the start before"


def test_what_was_made_for_one_start_of_a_server_is_nothing_to_the_next():
    pair = Pair(trust(), trust())
    headers = asked_again(pair)
    pair.verifier.check("POST", TARGET, headers)
    pair.server_clock.advance(5)
    started_anew(pair)
    assert "before this server started" in pair.refusal(headers)
    pair.verifier.check("POST", TARGET, asked_again(pair))


def test_behind_one_name_several_servers_take_who_has_asked_another_of_them():
    """Processes of a router, or routers behind a balancer: they have started at some time, and each has its own tag."""
    pair = Pair(trust(), trust())
    first = pair.verifier
    started_anew(pair)
    pair.client_clock.advance(5)
    pair.server_clock.advance(5)
    asked_again(pair)
    for verifier in (first, pair.verifier, first):
        verifier.check("POST", TARGET, pair.request())


def test_for_which_start_a_request_is_made_is_part_of_its_proof():
    pair = Pair(trust(), trust())
    pair.server_clock.advance(5)
    started_anew(pair)
    old, new = pair.request(), asked_again(pair)
    (tag,) = re.findall(r'tag="(.*?)"', new[INPUT])
    forged = {**old, INPUT: old[INPUT].replace('tag="kvferry"', f'tag="{tag}"')}
    assert "proof is wrong" in pair.refusal(forged)


def test_calls_that_are_refused_at_the_same_time_are_all_made_again():
    pair = Pair(trust(), trust())
    pair.server_clock.advance(5)
    started_anew(pair)
    refused = [pair.prover.prove("POST", HOST, TARGET, BODY) for _ in range(3)]
    assert all(pair.prover.learn(HOST, proof, pair.verifier.wanted) for proof in refused)


def test_who_is_refused_for_another_reason_asks_again_once():
    pair = Pair(trust(), trust())
    pair.client_clock.advance(31)
    assert "from now" in pair.refusal(asked_again(pair))
    assert not pair.prover.learn(HOST, pair.prover.prove("POST", HOST, TARGET, BODY), pair.verifier.wanted)


def test_a_server_that_starts_within_a_second_of_a_request_refuses_it_too():
    pair = Pair(trust(), trust())
    headers = pair.request()
    pair.server_clock.advance(0.001)
    started_anew(pair)
    assert "before this server started" in pair.refusal(headers)
    pair.client_clock.advance(0.002)
    pair.verifier.check("POST", TARGET, pair.request())


def test_as_many_clients_are_remembered_as_a_clusters_nodes_have():
    """A node of eight GPUs: 5 of its service, 16 of its workers, 2 of its scheduler."""
    assert ProofLimits().max_nodes == IndexLimits().max_nodes
    assert ProofLimits().max_senders >= 23 * IndexLimits().max_nodes


def test_what_heard_requests_are_good_for_is_what_the_page_on_security_says():
    """It names these two as open."""
    pair = Pair(trust(), trust())
    nameless = RequestVerifier(trust(), pair.server_clock, None)
    headers = pair.request()
    pair.verifier.check("POST", TARGET, headers)
    nameless.check("POST", TARGET, headers)
    with pytest.raises(ProofError, match="came before"):
        nameless.check("POST", TARGET, headers)
    pair.client_clock.advance(20)
    headers = pair.request()
    pair.verifier.check("POST", TARGET, headers)
    pair.server_clock.advance(5)
    RequestVerifier(trust(), pair.server_clock, frozenset({HOST})).check("POST", TARGET, headers)


def test_while_the_secret_is_changed_each_side_takes_the_others():
    for client, server in (((NEW, OLD), (OLD,)), ((OLD,), (NEW, OLD)), ((NEW, OLD), (NEW, OLD))):
        pair = Pair(trust(*client), trust(*server))
        try:
            pair.verifier.check("POST", TARGET, pair.request())
        except ProofError:
            refused = pair.prover.prove("POST", HOST, TARGET, BODY)
            assert pair.prover.learn(HOST, refused, pair.verifier.wanted)
            pair.verifier.check("POST", TARGET, pair.request())
    pair = Pair(trust(NEW), trust(OLD))
    assert not pair.prover.learn(HOST, pair.prover.prove("POST", HOST, TARGET, BODY), pair.verifier.wanted)
    assert not pair.prover.learn(HOST, pair.prover.prove("POST", HOST, TARGET, BODY), None)


def test_a_server_that_refuses_a_secret_that_it_knows_is_not_asked_again():
    pair = Pair(trust(NEW, OLD), trust(NEW, OLD))
    asked_again(pair)
    assert not pair.prover.learn(HOST, pair.prover.prove("POST", HOST, TARGET, BODY), pair.verifier.wanted)


def test_an_answer_proves_that_its_server_knows_the_secret_and_got_this_request():
    pair = Pair(trust(), trust())
    sent, other = (pair.prover.prove("POST", HOST, TARGET, BODY) for _ in range(2))
    got = pair.verifier.check("POST", TARGET, {"Host": HOST, **dict(sent.headers)})
    for body in (b"what is answered", None):
        answer = dict(pair.verifier.reply_headers(got, 200, body))
        assert pair.prover.proven_reply(sent, 200, answer) is not None
        assert pair.prover.proven_reply(sent, 204, answer) is None
        assert pair.prover.proven_reply(other, 200, answer) is None
        assert pair.prover.proven_reply(sent, 200, {}) is None
        assert pair.prover.proven_reply(sent, 200, dict(sent.headers)) is None
        assert pair.prover.proven_reply(sent, 200, {**answer, SIGNATURE: "kvferry=:AAAA:"}) is None
        assert pair.prover.proven_reply(sent, 200, {**answer, DIGEST: digest_of(b"another")}) is None
    whole = dict(pair.verifier.reply_headers(got, 200, b""))
    assert pair.prover.proven_reply(sent, 200, {name: whole[name] for name in (INPUT, SIGNATURE)}) is None


def test_an_answers_body_is_proved_with_it_and_a_streams_frames_one_by_one():
    pair = Pair(trust(), trust())
    sent = pair.prover.prove("POST", HOST, TARGET, BODY)
    got = pair.verifier.check("POST", TARGET, {"Host": HOST, **dict(sent.headers)})
    whole = pair.prover.proven_reply(sent, 200, dict(pair.verifier.reply_headers(got, 200, b"yes")))
    whole.check(b"yes")
    with pytest.raises(ProofError, match="changed on its way"):
        whole.check(b"no")
    head = dict(pair.verifier.reply_headers(got, 200, None))
    stream = pair.prover.proven_reply(sent, 200, head)
    with pytest.raises(ProofError, match="changed on its way"):
        stream.check(b"")
    seal = pair.verifier.seal(got)
    frames = [seal.seal(payload) for payload in (b"one", b"two", b"", b"four")]
    assert [stream.seal.open(frame) for frame in frames] == [b"one", b"two", b"", b"four"]
    spoilt = [
        [b"onE" + frames[0][3:]],
        [frames[1]],
        [frames[0], frames[0]],
        [frames[0], frames[2]],
        [frames[0][:-1]],
        [b""],
    ]
    for those in spoilt:
        opener = pair.prover.proven_reply(sent, 200, head).seal
        with pytest.raises(ProofError, match="left out or put in"):
            [opener.open(frame) for frame in those]
    other = pair.verifier.check("POST", TARGET, pair.request())
    with pytest.raises(ProofError):
        pair.prover.proven_reply(sent, 200, head).seal.open(pair.verifier.seal(other).seal(b"one"))


class Key(HTTPSignatureKeyResolver):
    """Of the library that checks us."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def resolve_public_key(self, key_id: str) -> bytes:
        return self.key

    resolve_private_key = resolve_public_key


class Message:
    """As that library wants one."""

    def __init__(self, method: str, url: str, headers: dict[str, str]) -> None:
        self.method, self.url, self.headers = method, url, headers


def test_a_library_for_rfc_9421_takes_our_proof():
    ours = trust()
    prover = RequestProver(ours, ManualClock(datetime.datetime.now().timestamp()))
    headers = {"Host": HOST, **dict(prover.prove("POST", HOST, TARGET, BODY).headers)}
    key = ours.secrets.derive(KeyLabel.HTTP, b"here")
    theirs = HTTPMessageVerifier(signature_algorithm=algorithms.HMAC_SHA256, key_resolver=Key(key))
    (result,) = theirs.verify(Message("POST", f"http://{HOST}{TARGET}", headers), body=BODY, expect_tag="kvferry")
    assert result.label == "kvferry"
    assert hashlib.sha256(BODY).digest() == base64.b64decode(headers["Content-Digest"].split(":")[1])


class TestSeenRequests:
    def test_each_number_of_each_sender_is_new_once_in_any_order(self):
        seen = SeenRequests(60.0)
        for number in (5, 1, 3, 9, 2, 100):
            assert seen.is_new(b"a", number, 0.0)
        for number in (5, 1, 3, 9, 2, 100):
            assert not seen.is_new(b"a", number, 0.0)
            assert seen.is_new(b"b", number, 0.0)
        assert seen.is_new(b"a", 4, 0.0)

    def test_what_it_no_longer_remembers_is_not_new(self):
        seen = SeenRequests(60.0, ProofLimits(window=8))
        assert seen.is_new(b"a", 1, 0.0)
        assert seen.is_new(b"a", 9, 0.0)
        assert seen.is_new(b"a", 2, 0.0)
        assert not seen.is_new(b"a", 1, 0.0)
        assert seen.is_new(b"a", 1000, 0.0)
        assert not seen.is_new(b"a", 990, 0.0)
        assert seen.is_new(b"a", 993, 0.0)
        assert not seen.is_new(b"a", 993, 0.0)

    def test_it_forgets_silent_senders_alone(self):
        seen = SeenRequests(60.0, ProofLimits(max_nodes=1, senders_per_node=2))
        assert seen.is_new(b"a", 1, 0.0)
        assert seen.is_new(b"b", 1, 30.0)
        assert not seen.is_new(b"c", 1, 59.0)
        assert seen.is_new(b"c", 1, 61.0)
        assert not seen.is_new(b"b", 1, 61.0)

    def test_it_takes_bounded_bytes_and_says_of_no_number_twice_that_it_is_new(self):
        limits = ProofLimits(window=1 << 12, max_seen_bytes=200_000, sender_bytes=256)
        seen, told, rng = SeenRequests(60.0, limits), set[tuple[bytes, int]](), random_numbers.Random(1)
        senders = [bytes([at, more]) for at in range(256) for more in range(2)]
        refused = 0
        for step in range(20_000):
            sender, number = rng.choice(senders), step // 4 + rng.randrange(3000)
            if seen.is_new(sender, number, 0.0):
                assert (sender, number) not in told
                told.add((sender, number))
            else:
                refused += (sender, number) not in told
            assert seen.num_bytes <= limits.max_seen_bytes
        assert refused, "at the bound what is not remembered is refused, though it is new"
        assert (
            seen.num_bytes
            == limits.sender_bytes * len(seen._senders)
            + 4 * sum(one.bits.bit_length() for one in seen._senders.values()) // 30
        )

    def test_without_a_bound_by_bytes_as_many_requests_would_take_many_times_that(self):
        seen = SeenRequests(60.0, ProofLimits(window=1 << 12, max_seen_bytes=1 << 40))
        for number in (0, 4000):
            for sender in range(512):
                assert seen.is_new(bytes([sender % 256, sender // 256]), number, 0.0)
        assert seen.num_bytes > 384_000

    def test_a_cluster_as_large_as_may_be_meets_the_bound_by_few_numbers(self):
        limits = ProofLimits()
        left = limits.max_seen_bytes * 3 // 4 - limits.max_senders * limits.sender_bytes
        assert left * 30 // 4 // limits.max_senders >= 900
