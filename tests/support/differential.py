"""The same body to two servers, and how their answers differ: a list of short texts, empty where they are alike.

An answer in one body is compared value by value, a stream as what its chunks come to and by the fields that they have.
What no two servers can have in common is compared by its type: ids, times, fingerprints, what was cached.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

_BY_TYPE = frozenset(
    ["id", "created", "created_at", "system_fingerprint", "cached_tokens", "signature", "server_load", "call_id"]
)
_CLOSE = 2e-3
"""Of two logprobs of the same token: batches round in other ways."""
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said. `body`: JSON, or the text that is none; of a stream its events, in `events`."""

    status: int
    body: Any = None
    events: tuple[Any, ...] | None = None


async def ask(session: aiohttp.ClientSession, url: str, method: str, path: str, body: Any) -> Answer:
    """`body`: a text is sent as it is, anything else as JSON; None: nothing."""
    data = body if isinstance(body, str) else None if body is None else json.dumps(body)
    async with session.request(method, url + path, data=data, headers={"Content-Type": "application/json"}) as reply:
        text = await reply.text()
        if reply.content_type == "text/event-stream":
            lines = [line for line in text.split("\n") if line.startswith(("data:", "event:"))]
            return Answer(reply.status, events=tuple(_event(line) for line in lines))
        return Answer(reply.status, _parsed(text))


def _event(line: str) -> Any:
    name, _, value = line.partition(":")
    return _parsed(value.strip()) if name == "data" else f"event: {value.strip()}"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def differences(theirs: Answer, ours: Answer, fields: frozenset[str]) -> list[str]:
    """Each as `where: theirs / ours`. `fields`: of which a refusal of ours has to name one."""
    if theirs.status // 100 != ours.status // 100:
        return [f"status: {theirs.status} / {ours.status}"]
    found = [] if theirs.status == ours.status else [f"status: {theirs.status} / {ours.status}"]
    if theirs.status >= 400:
        return [*found, *_of_refusals(theirs.body, ours.body, fields)]
    if (theirs.events is None) != (ours.events is None):
        return [*found, f"stream: {theirs.events is not None} / {ours.events is not None}"]
    if theirs.events is None or ours.events is None:
        return [*found, *sorted(set(_of_values("", theirs.body, ours.body)))]
    return [*found, *_of_streams(theirs.events, ours.events)]


def _of_refusals(theirs: Any, ours: Any, fields: frozenset[str]) -> Iterator[str]:
    """The keys of both bodies, and what they name. One of ours may name a field where theirs names none."""
    for name in sorted(_keys("", theirs) ^ _keys("", ours)):
        yield f"{name}: only {'theirs' if name in _keys('', theirs) else 'ours'}"
    said, wanted = (body.get("error", {}) if isinstance(body, Mapping) else {} for body in (ours, theirs))
    if said and type(said.get("code")) is not type(wanted.get("code")):
        yield f"error.code: {_kind(wanted.get('code'))} / {_kind(said.get('code'))}"
    param, message = _top(said.get("param")), str(said.get("message"))
    if fields and param not in fields and not any(name in message for name in fields):
        yield f"unnamed: {param} / {message[:_SHOWN]}"


def _top(param: str | None) -> str:
    """The field of the body that a refusal names."""
    return (param or "").removeprefix("body.").partition(".")[0].partition("[")[0]


def _keys(where: str, value: Any) -> set[str]:
    if not isinstance(value, Mapping):
        return {where}
    return {one for name, item in value.items() for one in _keys(f"{where}.{name}" if where else name, item)}


def _of_values(where: str, theirs: Any, ours: Any) -> Iterator[str]:
    """What is in one and not in the other, and values that are not the same."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name in sorted(theirs.keys() | ours.keys()):
            place = f"{where}.{name}" if where else name
            if name not in ours or name not in theirs:
                value, whose = (theirs[name], "theirs") if name in theirs else (ours[name], "ours")
                yield f"{place}: only {whose}, {_kind(value)}"
            elif name in _BY_TYPE:
                yield from _unlike(place, theirs[name], ours[name])
            else:
                yield from _of_values(place, theirs[name], ours[name])
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            yield f"{where}: {_brief(theirs)} / {_brief(ours)}"
            return
        for one, other in zip(theirs, ours, strict=True):
            yield from _of_values(f"{where}[]", one, other)
    elif isinstance(theirs, str) and isinstance(ours, str) and theirs != ours and theirs.strip() == ours.strip():
        yield f"{where}: white space around it"
    elif _kind(theirs) != _kind(ours) or not _same(theirs, ours):
        yield f"{where}: {_brief(theirs)} / {_brief(ours)}"


def _same(theirs: Any, ours: Any) -> bool:
    if isinstance(theirs, float) and isinstance(ours, float):
        return math.isclose(theirs, ours, abs_tol=_CLOSE, rel_tol=_CLOSE)
    return bool(theirs == ours)


def _unlike(where: str, theirs: Any, ours: Any) -> Iterator[str]:
    if _kind(theirs) != _kind(ours):
        yield f"{where}: {_kind(theirs)} / {_kind(ours)}"


def _kind(value: Any) -> str:
    return "null" if value is None else "number" if type(value) in (int, float) else type(value).__name__


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def _shape(where: str, value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return {one for name, item in value.items() for one in _shape(f"{where}.{name}" if where else name, item)}
    if isinstance(value, list):
        return {one for item in value for one in _shape(f"{where}[]", item)}
    return {f"{where}: {_kind(value)}"}


def _of_streams(theirs: tuple[Any, ...], ours: tuple[Any, ...]) -> Iterator[str]:
    yield from _of_values("", _folded(theirs), _folded(ours))
    shapes = [{one for event in events for one in _shape("", event)} for events in (theirs, ours)]
    yield from (f"chunks: only theirs, {one}" for one in _missing(shapes[0], shapes[1]))
    yield from (f"chunks: only ours, {one}" for one in _missing(shapes[1], shapes[0]))


def _missing(shape: set[str], other: set[str]) -> list[str]:
    """What is in the first alone. Whether a field was null before it had a value depends on where a stream is cut."""
    places = {one.rpartition(": ")[0] for one in other}
    later = {one for one in shape if one.endswith(": null") and one.removesuffix(": null") in places}
    return sorted(shape - other - later)


def _folded(events: tuple[Any, ...]) -> dict[str, Any]:
    """What a stream comes to, however it is cut."""
    chunks = [event for event in events if isinstance(event, Mapping)]
    whole: dict[str, Any] = {
        "done": [event for event in events if event == "[DONE]"] and events[-1] == "[DONE]",
        "errors": [event["error"] for event in chunks if "error" in event],
        "choices": {},
        "usage": [chunk["usage"] for chunk in chunks if chunk.get("usage") and not chunk.get("choices")],
        "usage_beside": sorted({bool(chunk.get("usage")) for chunk in chunks if chunk.get("choices")}),
    }
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            _fold(whole["choices"].setdefault(str(choice["index"]), {}), choice)
    return whole


def _fold(into: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Texts and lists are put one behind the other, parts of a call by their index; any other value is the last."""
    for name, value in piece.items():
        if name == "tool_calls":
            for call in value or ():
                _fold(into.setdefault("tool_calls", {}).setdefault(str(call["index"]), {}), call)
        elif isinstance(value, Mapping):
            _fold(into.setdefault(name, {}), value)
        elif isinstance(value, str) and name not in ("id", "role", "type", "finish_reason", "stop_reason", "object"):
            into[name] = into.get(name, "") + value
        elif isinstance(value, list):
            into[name] = into.get(name, []) + value
        elif value is not None:
            into[name] = value
