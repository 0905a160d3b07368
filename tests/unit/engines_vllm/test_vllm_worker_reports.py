"""An idle step's wait: as long as something may come, and not a moment longer."""

import threading

import pytest

from engines.vllm.connector.orders import LoadOrder
from engines.vllm.connector.worker_reports import TransferReports

LIMIT_S = 60.0


@pytest.fixture
def reports():
    return TransferReports()


def waiting(reports: TransferReports) -> threading.Thread:
    thread = threading.Thread(target=reports.wait_for_report, args=(LIMIT_S,), daemon=True)
    thread.start()
    return thread


def ended(thread: threading.Thread) -> bool:
    thread.join(LIMIT_S / 2)
    return not thread.is_alive()


def order(request_id: str) -> LoadOrder:
    return LoadOrder(request_id=request_id, leg=None, first_chunk=0, chunks=())


def test_with_nothing_under_way_there_is_nothing_to_wait_for(reports):
    reports.save_ordered("its request goes on")
    assert ended(waiting(reports))


def test_a_load_that_ends_is_news(reports):
    reports.load_ordered(order("r"))
    thread = waiting(reports)
    reports.load_ended(order("r"), 0)
    assert ended(thread)
    assert reports.report(())[1] == {"r"}


def test_a_finished_requests_last_save_is_news(reports):
    ticket = reports.save_ordered("r")
    reports.report({"r"})
    thread = waiting(reports)
    reports.save_ended(ticket)
    assert ended(thread)
    assert reports.report(())[0] == {"r"}


def test_the_jobs_end_is_news(reports):
    reports.load_ordered(order("r"))
    thread = waiting(reports)
    reports.end_all()
    assert ended(thread)


def test_news_from_before_is_not_waited_for_again(reports):
    for name in ("r", "s"):
        reports.load_ordered(order(name))
    reports.load_ended(order("r"), 0)
    assert ended(waiting(reports))


def test_it_waits_no_longer_than_it_is_told(reports):
    reports.load_ordered(order("r"))
    reports.wait_for_report(0.001)
    assert reports.report(())[1] == set()
