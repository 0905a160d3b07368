"""Whatever an operator has a router do leaves one line in its log, whoever asked and however it ended."""

import logging
from typing import Any

import httpx
import pytest
from support.router_fakes import make_rig

from router.tenants.paths import POOLING

QUESTIONS = {"/v1/cache/lookup"}
"""Calls by POST, as they have a body, that change nothing."""
OF_CLIENTS = {
    *("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens"),
    *("/inference/v1/generate", "/v1/chat/completions/batch"),
    *POOLING,
    *("/tokenize", "/detokenize", "/ping", "/v1/responses", "/v1/responses/{response_id}/cancel"),
}
PROMPT = {"prompt": [3] * 40}
NODE = {"node": "d0"}
ORDERS: dict[str, tuple[Any, str]] = {
    "/v1/cache/clear": ({"fingerprints": ["0a1b"], "force": True}, 'what="cache clear" on="0a1b force"'),
    "/v1/cache/warm": (PROMPT, 'what="cache warm" on="1 prompts"'),
    "/v1/cache/prefetch": (PROMPT, 'what="cache prefetch" on="1 prompts"'),
    "/v1/cache/pin": (PROMPT, 'what="cache pin" on="1 prompts"'),
    "/v1/cache/unpin": (PROMPT, 'what="cache unpin" on="1 prompts"'),
    "/v1/cache/expire": (PROMPT, 'what="cache expire" on="1 prompts"'),
    "/v1/cache/evict": (PROMPT, 'what="cache evict" on="1 prompts"'),
    "/v1/blend/on": ({"kinds": ["part"]}, 'what="blend on" on=part'),
    "/v1/weights": ({"version": "v2"}, "what=weights on=v2"),
    "/v1/nodes/drain": (NODE, 'what="nodes drain" on=d0'),
    "/v1/nodes/undrain": (NODE, 'what="nodes undrain" on=d0'),
    "/v1/nodes/role": (NODE | {"role": "prefiller"}, 'what="nodes role" on="d0 prefiller"'),
    "/v1/nodes/try": (NODE, 'what="nodes try" on=d0'),
    "/v1/nodes/rebalance": ({"action": "start", "most_bytes": 5}, 'what="nodes rebalance" on="start 5"'),
    "/v1/janitor": (
        {"kind": "node_orders", "ids": ["a@1.0"], "older_s": 0},
        'what=janitor on="1 node_orders" outcome="0 removed"',
    ),
    "/v1/nodes/remove": ({**NODE, "force": True}, 'what="nodes remove" on="d0 force"'),
}


async def lines_of(caplog: pytest.LogCaptureFixture, path: str, **request: Any) -> list[str]:
    """What the router's own log has of one call; the index, in the same process here, has lines of its own."""
    rig = await make_rig()
    caplog.clear()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(rig.app), base_url="http://router") as client:
        with caplog.at_level(logging.INFO, "audit"):
            await client.post(path, **request)
    found = [record.getMessage() for record in caplog.records if record.name == "audit"]
    return [line for line in found if "what=/v1/" not in line]


async def test_every_call_that_changes_something_is_known_here():
    rig = await make_rig()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(rig.app), base_url="http://router") as client:
        paths = (await client.get("/openapi.json")).json()["paths"]
    posts = {path for path, calls in paths.items() if "post" in calls}
    assert posts == ORDERS.keys() | QUESTIONS | OF_CLIENTS


@pytest.mark.parametrize("path", ORDERS)
async def test_each_order_leaves_one_line_that_says_who_what_on_what_and_the_outcome(caplog, path):
    body, said = ORDERS[path]
    (line,) = await lines_of(caplog, path, json=body)
    assert line.startswith("audit who=127.0.0.1:123 ") and said in line and "outcome=" in line


@pytest.mark.parametrize("path", ORDERS)
async def test_one_that_is_refused_leaves_one_too(caplog, path):
    (line,) = await lines_of(caplog, path, content=b"no json")
    assert line.endswith("outcome=invalid_request_error")


async def test_questions_leave_none(caplog):
    assert await lines_of(caplog, "/v1/cache/lookup", json=PROMPT) == []
