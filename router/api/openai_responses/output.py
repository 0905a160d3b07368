"""The output of one answer of /v1/responses, as it comes: its items, and the events by which a stream tells of them."""

import secrets
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from router.api.formats.read_choice import ReadChoice

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PARTS = {"message": "output_text", "reasoning": "reasoning_text"}
"""By type of item, that of its one part, by which its events are called, too."""


class OutputEvent(NamedTuple):
    """Of a stream, without its number."""

    type: str
    fields: dict[str, object]


class OutputItems:
    """Those of one answer, in the order in which they began. A row of what `ReadChoice` tells apart: what is of another
    kind than before ends an item and begins the next; so does another call."""

    def __init__(self, choice: ReadChoice) -> None:
        self.ended: list[dict[str, object]] = []
        """Those that are whole, or were cut off by the end."""
        self.kind: str | None = None
        """The type of the item that has begun and not ended."""
        self._choice = choice
        self._id = ""
        self._pieces: list[str] = []
        self._logprobs: list[msgspec.Raw] = []
        self._number, self._call = 0, dict[str, object]()
        """Of the call that began last, and what an item says of it."""

    def add(self, delta: dict[str, object], logprobs: Sequence[msgspec.Raw] = ()) -> list[OutputEvent]:
        """More of the answer, and with text of a message the logprobs that came with it."""
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            (part,) = calls
            if "id" in part:
                before = self.end()
                self._number = part["index"]
                self._call = {"call_id": part["id"], "name": part["function"]["name"]}
                return [*before, *self._begin("function_call")]
            return [self._more("function_call_arguments", part["function"]["arguments"], {})]
        kind, text = ("message", delta["content"]) if "content" in delta else ("reasoning", delta["reasoning"])
        events = [] if self.kind == kind else [*self.end(), *self._begin(kind)]
        place: dict[str, object] = {"content_index": 0}
        if kind == "message":
            self._logprobs += logprobs
            place["logprobs"] = logprobs
        return [*events, self._more(_PARTS[kind], str(text), place)]

    def end(self, *, cut: bool = False) -> list[OutputEvent]:
        """The item that has begun is over; `cut`: by the answer's end, before its own. Nothing where there is none."""
        kind, self.kind = self.kind, None
        if kind is None:
            return []
        text = "".join(self._pieces)
        if kind == "function_call":
            cut = not self._choice.calls[self._number].ended
            item = self._item(kind, cut=cut, arguments=text, **self._call)
            events = [self._event("function_call_arguments.done", arguments=text, name=self._call["name"])]
        else:
            part = self._part(kind, text)
            more: dict[str, object] = {"role": "assistant"} if kind == "message" else {"summary": []}
            item = self._item(kind, cut=cut, content=[part], **more)
            said = {"logprobs": self._logprobs} if kind == "message" else {}
            events = [
                self._event(f"{_PARTS[kind]}.done", content_index=0, text=text, **said),
                self._event("content_part.done", content_index=0, part=part),
            ]
        events.append(OutputEvent("response.output_item.done", {"output_index": len(self.ended), "item": item}))
        self.ended.append(item)
        return events

    def _begin(self, kind: str) -> list[OutputEvent]:
        self.kind, self._id = kind, f"{_PREFIXES[kind]}_{secrets.token_hex(16)}"
        self._pieces, self._logprobs = [], []
        begun: dict[str, dict[str, object]] = {
            "message": {"role": "assistant", "content": []},
            "reasoning": {"summary": []},
            "function_call": {"arguments": "", **self._call},
        }
        item = {"id": self._id, "type": kind, "status": "in_progress", **begun[kind]}
        added = OutputEvent("response.output_item.added", {"output_index": len(self.ended), "item": item})
        if kind == "function_call":
            return [added]
        return [added, self._event("content_part.added", content_index=0, part=self._part(kind, ""))]

    def _more(self, name: str, text: str, place: dict[str, object]) -> OutputEvent:
        self._pieces.append(text)
        return self._event(f"{name}.delta", delta=text, **place)

    def _event(self, kind: str, /, **fields: object) -> OutputEvent:
        return OutputEvent(f"response.{kind}", {"item_id": self._id, "output_index": len(self.ended), **fields})

    def _item(self, kind: str, *, cut: bool, **fields: object) -> dict[str, object]:
        status = "incomplete" if cut else "completed"
        return {"id": self._id, "type": kind, "status": status, **fields}

    def _part(self, kind: str, text: str) -> dict[str, object]:
        part: dict[str, object] = {"type": _PARTS[kind], "text": text}
        return {**part, "annotations": [], "logprobs": self._logprobs} if kind == "message" else part
