"""What of an answer's tokens is text, and how logprobs name them: as the client asks, streamed or not."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.router_fakes import FakeNode, FakeNodes, make_rig

from kvcore.types import Role
from nodeapi.messages import FinishReason, GenerateRequest, TokenDelta, TokenLogprob
from router.requests.limits import RequestLimits
from router.requests.spec import TextOptions
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import FolderTokenizer
from tests.support.small_tokenizers import byte_fallback, byte_level, saved, whole_words

IMPATIENT = RequestLimits(patience_s=0.0, retry_pause_s=0.01)
ENDPOINTS = ["/v1/completions", "/v1/chat/completions"]


class Speaker(FakeNode):
    """Says these tokens, of which the last one may be a stop token."""

    ids: list[int]
    ends: bool = False

    async def _deltas(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        for number, token_id in enumerate(self.ids):
            last = number == len(self.ids) - 1
            yield TokenDelta(
                token_ids=[token_id],
                logprobs=[TokenLogprob(logprob=-1.0, top=[(self.ids[0], -0.5), (token_id, -1.0)])],
                finish_reason=(FinishReason.STOP if self.ends else FinishReason.LENGTH) if last else None,
                stop_token_id=token_id if last and self.ends else None,
            )


async def answer_of(node: Speaker, tokenizer: FolderTokenizer, path: str, *, stream: bool, **more: Any) -> Any:
    """(the text, the entries of logprobs) of the answer; both endpoints' in chat's form."""
    rig = await make_rig(FakeNodes([node]), tokenizer, limits=IMPATIENT)
    body: dict[str, Any] = {"model": "fake-model", "max_tokens": len(node.ids), "stream": stream, **more}
    if path == ENDPOINTS[0]:
        body |= {"prompt": "the", "logprobs": 2}
    else:
        body |= {"messages": [{"role": "user", "content": "the"}], "logprobs": True, "top_logprobs": 2}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    bodies = [json.loads(event[6:]) for event in reply.text.split("\n\n")[:-2]] if stream else [reply.json()]
    text, entries = "", []
    for choice in [choice for event in bodies for choice in event["choices"]]:
        given = choice["logprobs"] or {}
        text += choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
        entries += given.get("content") or []
        for at, name in enumerate(given.get("tokens", ())):
            entries.append({"token": name, "top": given["top_logprobs"][at], "offset": given["text_offset"][at]})
    return text, entries


def model(tmp_path: Path, kind: Any) -> tuple[FolderTokenizer, Any]:
    own = kind()
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return FolderTokenizer(saved(own, tmp_path)), own


def speaker(ids: list[int], *, ends: bool = False) -> Speaker:
    node = Speaker("d0", Role.DECODER)
    node.ids, node.ends = ids, ends
    return node


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_the_stop_string_is_shown_if_asked_for(tmp_path: Path, path: str, stream: bool) -> None:
    tokenizer, _ = model(tmp_path, byte_level)
    node = speaker(tokenizer.encode("one two three"))
    for shown, text in ((False, "one "), (True, "one tw"), (None, "one ")):
        more = {"stop": ["tw"], "include_stop_str_in_output": shown}
        assert (await answer_of(node, tokenizer, path, stream=stream, **more))[0] == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_special_tokens_are_shown_if_asked_for(tmp_path: Path, path: str, stream: bool) -> None:
    tokenizer, own = model(tmp_path, byte_level)
    end = own.token_to_id("<|end|>")
    ids = [*tokenizer.encode("a"), end, *tokenizer.encode("b"), end]
    for ends, more, text in (
        (False, {}, "ab"),
        (False, {"skip_special_tokens": None}, "ab"),
        (False, {"skip_special_tokens": False}, "a<|end|>b<|end|>"),
        (True, {"skip_special_tokens": False}, "a<|end|>b"),
        (True, {"skip_special_tokens": False, "include_stop_str_in_output": True}, "a<|end|>b<|end|>"),
        (True, {"include_stop_str_in_output": True}, "ab"),
    ):
        assert (await answer_of(speaker(ids, ends=ends), tokenizer, path, stream=stream, **more))[0] == text, more


def test_special_tokens_in_a_row_are_joined_if_asked_for(tmp_path: Path) -> None:
    tokenizer, own = model(tmp_path, whole_words)
    word, end = own.token_to_id("the"), own.token_to_id("<|end|>")
    for skip, spaces, text in (
        (False, True, " the <|end|> <|end|> the"),
        (False, False, " the <|end|><|end|> the"),
        (True, False, " the the"),
    ):
        detokenizer = Detokenizer(tokenizer, [word], TextOptions(skip, spaces))
        assert "".join(detokenizer.feed([token_id]) for token_id in (word, end, end, word)) == text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
async def test_an_end_that_comes_first_has_its_entry(tmp_path: Path, path: str, stream: bool) -> None:
    tokenizer, own = model(tmp_path, byte_level)
    text, entries = await answer_of(speaker([own.token_to_id("<|end|>")], ends=True), tokenizer, path, stream=stream)
    assert text == "" and [entry["token"] for entry in entries] == ["<|end|>"]


@pytest.mark.parametrize("stream", [False, True])
async def test_bytes_of_a_chats_tokens_join_to_its_text(tmp_path: Path, stream: bool) -> None:
    tokenizer, own = model(tmp_path, byte_level)
    ids = [*tokenizer.encode(" 😀 the é"), own.token_to_id("<|end|>")]
    text, entries = await answer_of(speaker(ids, ends=True), tokenizer, ENDPOINTS[1], stream=stream)
    assert text == " 😀 the é" and len(entries) == len(ids)
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text + "<|end|>"
    assert "".join(entry["token"] for entry in entries) == text + "<|end|>"
    assert [entry["top_logprobs"][1]["bytes"] for entry in entries] == [entry["bytes"] for entry in entries]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_completions_tokens_keep_their_blanks_and_say_where_they_begin(tmp_path: Path, stream: bool) -> None:
    tokenizer, own = model(tmp_path, byte_fallback)
    ids = [own.token_to_id(piece) for piece in ("the", "▁the", "<0xC3>", "<0xA9>", "▁")]
    text, entries = await answer_of(speaker(ids), tokenizer, ENDPOINTS[0], stream=stream)
    assert text == "the theé " and [entry["token"] for entry in entries] == ["the", " the", "", "é", " "]
    assert [entry["offset"] for entry in entries] == [0, 3, 7, 7, 8]
    assert entries[1]["top"] == {" the": -1.0, "the": -0.5}
