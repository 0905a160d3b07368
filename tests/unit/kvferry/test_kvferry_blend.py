"""`kvferry blend`: what is shown of a router, what is asked of it, and the check of a model on one's own documents."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console
from support.tiny_models import make_tiny_model

from kvcore.config.kv.settings import BlendConfig
from kvcore.errors import ConfigError
from kvferry.blend.check import CheckedModel, CheckedSetting, advice, gate_limits
from kvferry.blend.commands import BlendCommands
from kvferry.blend.folder import GivenDocument, NearestDocuments, read_documents, read_questions
from kvferry.cli import main
from router.shadow.reports import (
    BlendReport,
    BlendTurned,
    DivergentChunk,
    KindReport,
    ReuseDivergence,
)
from router.upkeep.reports import PromptWarmed, WarmReply

ON = BlendReport(mode="first_k", k=8, max_kl=0.3, min_agreement=0.8, shadow=0.005)


@asynccontextmanager
async def router(replies: dict[str, Any]) -> AsyncIterator[tuple[str, list[tuple[str, Any]]]]:
    asked: list[tuple[str, Any]] = []

    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        asked.append((request.path, json.loads(body) if body else None))
        reply = replies[request.path]
        status = 400 if isinstance(reply, str) else 200
        return web.Response(
            status=status, body=msgspec.json.encode({"error": {"message": reply}} if status == 400 else reply)
        )

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with TestServer(app) as server:
        yield str(server.make_url("")).rstrip("/"), asked


async def ran(replies: dict[str, Any], command: Any) -> tuple[int, str, list[tuple[str, Any]]]:
    out = io.StringIO()
    async with router(replies) as (url, asked):
        commands = BlendCommands(url, Console(file=out, width=200))
        code = await asyncio.to_thread(command, commands)
    return code, out.getvalue(), asked


async def test_the_status_says_what_is_on_what_is_off_and_why():
    kinds = [
        KindReport(model="m", kind="field", compared=12, window=12, kl=0.0123, agreement=0.96),
        KindReport(model="m", kind="part", off="over 8 comparisons it was bad", since=1.0, compared=8),
    ]
    report = msgspec.structs.replace(ON, kinds=kinds, exact_shadow=0.001, comparisons={"exact same": 3})
    code, said, _ = await ran({"/v1/blend": report}, BlendCommands.status)
    assert code == 1
    assert "first_k, k 8, 0.5% of requests are compared (at most 0.3 nats, at least 80% of tokens the same)" in said
    assert "field of m: on, 12 compared: 0.0123 nats, 96% over the last 12" in said
    assert "part of m: OFF for" in said and "over 8 comparisons it was bad" in said and "kvferry blend on" in said
    assert "verification of the cache: 0.1% of requests are computed again (kv.shadow)" in said
    assert "3 exact same, 0 waiting" in said


async def test_a_wrong_chunk_is_shown_with_its_way_and_what_is_left_of_it():
    found = ReuseDivergence(
        request_id="cmpl-1",
        node="d0",
        at=1.0,
        gap=2.0,
        chunks=[DivergentChunk(key="ab" * 16, number=3, distance=0.7)],
        sources=["tier redis of d0"],
        replicas=["p0"],
        left=["d1: away"],
    )
    report = BlendReport(mode="off", divergences=[found])
    code, said, _ = await ran({"/v1/blend": report}, BlendCommands.status)
    assert code == 1 and "documents: not reused" in said
    for words in ("cmpl-1 on d0, tier redis of d0", f"chunk 3 {'ab' * 16}: off by 0.7", "memory of p0", "d1: away"):
        assert words in said


async def test_kinds_are_turned_on_and_a_refusal_is_a_sentence(capsys):
    turned = BlendTurned(kinds=["part of m"])
    code, said, asked = await ran({"/v1/blend/on": turned}, lambda it: it.turn_on(["part"]))
    assert (code, said.strip(), asked) == (0, "on again: part of m", [("/v1/blend/on", {"kinds": ["part"]})])
    code, _, _ = await ran({"/v1/blend/on": "kv.blend.mode is off"}, lambda it: it.turn_on(None))
    assert code == 1 and "kv.blend.mode is off" in capsys.readouterr().err


async def test_a_folders_documents_are_warmed_behind_the_header(tmp_path):
    (tmp_path / "docs" / "more").mkdir(parents=True)
    (tmp_path / "docs/a.md").write_text("first text\n")
    (tmp_path / "docs/more/b.txt").write_text("second text")
    (tmp_path / "docs/.hidden").write_text("not this")
    (tmp_path / "docs/empty.txt").write_text(" \n")
    (tmp_path / "header").write_text("be brief")
    line = PromptWarmed(
        tokens=9, cached_tokens=2, computed_tokens=7, stored_tokens=7, node="p0", seconds=0.1, no_room=False
    )
    reply = WarmReply(prompts=[line])
    code, said, asked = await ran({"/v1/cache/warm": reply}, lambda it: it.warm(tmp_path / "docs", tmp_path / "header"))
    assert code == 0 and "documents: 2, 14 tokens computed, 4 cached before" in said
    assert [body["messages"][0] for _, body in asked] == [{"role": "system", "content": "be brief"}] * 2
    named = [body["messages"][1]["content"][0] for _, body in asked]
    assert named == [{"type": "text", "text": text, "document": True} for text in ("first text", "second text")]


# --- files ---


@pytest.mark.parametrize(
    ("made", "words"), [(None, "no such folder"), ({}, "no file with text"), ({"a": b"\xff\xfe"}, "a: is no UTF-8")]
)
def test_a_folder_without_documents_is_refused_by_name(tmp_path, made, words):
    folder = tmp_path / "docs"
    if made is not None:
        folder.mkdir()
        for name, text in made.items():
            (folder / name).write_bytes(text)
    with pytest.raises(ConfigError, match=words):
        read_documents(folder)


def test_a_file_without_questions_is_refused_by_name(tmp_path):
    (tmp_path / "q").write_text("\n \n")
    with pytest.raises(ConfigError, match="write one a line"):
        read_questions(tmp_path / "q")
    with pytest.raises(ConfigError, match="nowhere"):
        read_questions(tmp_path / "nowhere")


def test_the_nearest_document_stands_next_to_the_question():
    texts = {"ferry": "the ferry crosses the river", "bell": "the bell rings", "book": "the tide book of the river"}
    nearest = NearestDocuments([GivenDocument(name, text) for name, text in texts.items()])
    assert [one.name for one in nearest.of("What is in the tide book?", 2)][-1] == "book"
    assert len(nearest.of("anything", 9)) == 3


# --- check ---


def checked(k: int | None, *settings: tuple[int, float, float]) -> CheckedModel:
    made = [
        CheckedSetting(k=k, questions=30, kl=kl, agreement=agreement, full_s=1.0, reused_s=0.1, holds=False)
        for k, kl, agreement in settings
    ]
    return CheckedModel(model="m", settings=made, max_kl=0.3, min_agreement=0.8, prompt_tokens=900, k=k)


def test_the_advice_is_the_least_k_with_limits_that_notice_what_is_wrong():
    lines = advice(checked(8, (0, 0.5, 0.7), (8, 0.04, 0.95)))
    assert lines[-2:] == ["kv:", "  blend: {mode: first_k, k: 8, max_kl: 0.1, min_agreement: 0.85}"]
    kv = parse_blend("\n".join(lines[-2:]))
    assert kv == BlendConfig(mode="first_k", k=8, max_kl=0.1, min_agreement=0.85)
    assert gate_limits(checked(0, (0, 0.0, 1.0)).settings[0]) == (0.02, 0.9)
    assert "leave kv.blend.mode off" in advice(checked(None, (0, 0.5, 0.7)))[-1]


def parse_blend(text: str) -> BlendConfig:
    import yaml

    return msgspec.convert(yaml.safe_load(text)["kv"]["blend"], type=BlendConfig)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("model"))


@pytest.fixture
def asked(tmp_path: Path) -> list[str]:
    (tmp_path / "docs").mkdir()
    for name, text in (("a", "the ferry crosses the river"), ("b", "the bell rings at noon"), ("c", "salt and fish")):
        (tmp_path / "docs" / name).write_text(text)
    (tmp_path / "questions").write_text("when does the bell ring?\nwhat crosses the river?\n")
    return ["--documents", str(tmp_path / "docs"), "--questions", str(tmp_path / "questions")]


def test_a_model_is_checked_on_ones_own_documents(model, asked, capsys):
    main(["blend", "check", str(model), *asked, "--json"])
    said = json.loads(capsys.readouterr().out)
    assert [one["k"] for one in said["settings"]] == [0, 8, 16, 32]
    assert all(one["questions"] == 2 and one["reused_s"] > 0 for one in said["settings"])
    main(["blend", "check", str(model), *asked])
    said = capsys.readouterr().out
    assert "first token diverges by" in said and ("take k" in said or "leave kv.blend.mode off" in said)


def test_what_cannot_be_checked_is_refused_by_name(model, asked, tmp_path, capsys):
    assert main(["blend", "check", str(tmp_path / "nowhere"), *asked]) == 2
    assert "nowhere" in capsys.readouterr().err
    window = make_tiny_model("mistral_sliding", tmp_path / "window")
    assert main(["blend", "check", str(window), *asked]) == 2
    assert "documents cannot be reused: it has layers with a sliding window" in capsys.readouterr().err
    (tmp_path / "cluster.yaml").write_text(
        "cluster: c\nmodel: {path: m, name: m}\nengine: {kind: vllm}\nnodes: {d: {role: decoder, port: 9000}}\n"
    )
    assert main(["blend", "check", str(model), *asked, "--config", str(tmp_path / "cluster.yaml")]) == 2
    assert "engine vllm: it reuses no documents" in capsys.readouterr().err
