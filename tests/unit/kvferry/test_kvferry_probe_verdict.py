"""What is said of a measured pair: every warning, and when none is due."""

import pytest
from support.probe import probe_report

from kvferry.doctor.verdict import Level, Outcome, Problem, Verdict, judge


def verdicts(**fields: object) -> list[Verdict]:
    return judge(Outcome("p0", "d0", probe_report(**fields)))


def only(**fields: object) -> Verdict:
    (verdict,) = verdicts(**fields)
    assert verdict.subject == "p0 -> d0" and (verdict.level is Level.OK) == (not verdict.remedy)
    return verdict


def test_a_pair_at_its_links_rate_is_fine():
    assert only() == Verdict(Level.OK, "p0 -> d0", "tcp")


def test_a_fallback_is_never_silent():
    verdict = only(asked="ucx")
    assert verdict.level is Level.WARN
    assert verdict.detail == "tcp is used, the fallback; the configuration asks for ucx"
    assert "says what ucx lacks there" in verdict.remedy


@pytest.mark.parametrize(
    ("transport", "remedy"), [("tcp", "transport.streams"), ("ucx", "docs/rdma.md"), ("nixl", "docs/rdma.md")]
)
def test_less_than_half_of_the_links_rate_is_worth_a_warning(transport, remedy):
    fields = {"transport": transport, "asked": transport, "devices": ["mlx5_0:1"], "link_rate": 12.5e9}
    verdict = only(**fields, put_rate=6.2e9, get_rate=6.3e9)
    assert verdict.level is Level.WARN and remedy in verdict.remedy
    assert verdict.detail == "put 6.20 GB/s, below half of 12.50 GB/s, the rate of mlx5_0:1"
    assert only(**fields, put_rate=1e9, get_rate=2e9).detail.startswith("put 1.00 GB/s and get 2.00 GB/s, below")
    assert only(**fields, put_rate=6.3e9, get_rate=6.3e9).level is Level.OK


def test_a_link_that_states_no_rate_gives_no_expectation_and_says_so():
    verdict = only(devices=["lo"], link_rate=None, put_rate=1.0, get_rate=1.0)
    assert verdict.level is Level.OK and "lo states no rate, so rates are not judged" in verdict.detail
    assert "its way states no rate" in only(devices=[], link_rate=None).detail


def test_shared_memory_is_held_against_a_copy_of_the_same_buffer():
    fields = {"transport": "shm", "shown": "shm", "devices": [], "link_rate": None, "latency_s": 13e-6}
    verdict = only(**fields, copy_rate=10e9, put_rate=3.4e9, get_rate=3.6e9)
    assert verdict.level is Level.WARN and "put 3.40 GB/s, below half of 7.00 GB/s, 0.7 of a copy" in verdict.detail
    assert only(**fields, copy_rate=10e9, put_rate=3.6e9, get_rate=3.6e9).level is Level.OK


def test_rates_of_a_small_batch_are_not_judged():
    verdict = only(num_bytes=1 << 20, put_rate=1.0, get_rate=1.0)
    assert verdict.level is Level.OK and "too few to judge" in verdict.detail


@pytest.mark.parametrize(("transport", "late_s"), [("shm", 140e-6), ("tcp", 1.3e-3), ("ucx", 2e-3), ("nixl", 4e-3)])
def test_a_latency_far_above_the_transports_is_worth_a_warning(transport, late_s):
    fields = {"transport": transport, "asked": transport, "copy_rate": 1e9}
    verdict = only(**fields, latency_s=late_s)
    assert verdict.level is Level.WARN and f"takes {late_s * 1e6:.0f} us" in verdict.detail
    assert only(**fields, latency_s=late_s / 2).level is Level.OK


def test_all_warnings_of_a_pair_are_told():
    found = verdicts(asked="ucx", put_rate=1e6, get_rate=1e6, latency_s=1.0)
    assert [verdict.level for verdict in found] == [Level.WARN] * 3


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        ("peer_unreachable", "firewall"),
        ("transfer_timeout", "stopped"),
        ("deadline_exceeded", "stopped"),
        ("node_unavailable", "kvferry status"),
        ("overloaded", "ask again"),
        ("segment_unknown", "started again"),
        ("metadata_unavailable", "metadata server"),
        ("invalid_request_error", "same version"),
        ("silent", "kvferry status"),
        ("of_tomorrow", "log of the node"),
    ],
)
def test_a_pair_that_cannot_be_measured_is_named_with_what_to_do(code, remedy):
    (verdict,) = judge(Outcome("p0", "d0", Problem(code, "segment d0.1: its owner went away")))
    assert verdict.level is Level.WRONG and verdict.subject == "p0 -> d0"
    assert verdict.detail == "segment d0.1: its owner went away" and remedy in verdict.remedy
