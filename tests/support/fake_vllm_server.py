"""vLLM servers as they look from outside: the OpenAI API of 0.32 with NixlConnector or MooncakeConnector behind it.

Every field of every request is held against what vLLM takes and what its connectors need (`World.violations` has what
was wrong). The fake model is greedy, or draws by the seed alone; a test can make a server refuse, hang or die anywhere.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from support.router_fakes import next_token, prompt_rows, serve

from kvcore.handoff import HandoffKind
from kvcore.types import Role

MODEL = "fake-model"
MAX_MODEL_LEN = 2048
EOS = 0
Body = dict[str, Any]
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
FIELDS = {
    *SAMPLING,
    *("model", "prompt", "max_tokens", "min_tokens", "n", "stream", "stream_options", "stop_token_ids", "ignore_eos"),
    *("logit_bias", "logprobs", "return_tokens_as_token_ids", "return_token_ids", "seed", "cache_salt"),
    *("prompt_logprobs", "logprob_token_ids", "kv_transfer_params", "structured_outputs"),
}
NIXL_PREFILL = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class ContractError(Exception):
    """A request that vLLM or its connector would not take, or would get wrong."""


class Cut(asyncio.CancelledError):
    """The server itself broke the connection off."""


@dataclass
class Transfer:
    """KV that one prefill leg computes and one sequence of one decode leg fetches."""

    prompt: list[int] | None = None
    params: Body = field(default_factory=dict)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    taken: bool = False


@dataclass
class World:
    """What the servers of one test share: the KV that is on its way."""

    kind: HandoffKind
    transfers: dict[str, Transfer] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    bootstraps: dict[str, str] = field(default_factory=dict)
    """Bootstrap URL -> engine id."""


@dataclass
class FakeVllm:
    """One server. What it is told to do wrong, and what reached it."""

    name: str
    role: Role
    world: World
    model: str = MODEL
    adapters: dict[str, str] = field(default_factory=dict)
    """Started with --lora-modules: their paths by name."""
    details: bool = True
    """Started with --enable-prompt-tokens-details."""
    connector: bool = True
    sends: bool = True
    """With mooncake: a prefill leg's KV goes out once it is computed."""
    cached_tokens: int = 0
    health: int = 200
    dead: bool = False
    """Cuts every connection."""
    refusal: tuple[int, str] | None = None
    """Status and message that every leg is answered with."""
    late_error: tuple[int, str] | None = None
    """Code and message of an event that ends each stream before its first token."""
    gate: asyncio.Event | None = None
    """Legs wait for it."""
    die_after: int | None = None
    """Events of tokens after which streams break off; 0: before the first, once the answer has begun."""
    abort_after: int | None = None
    """Likewise, by finish_reason abort, as when it is told to stop."""
    load_fails: bool = False
    """Fetching KV fails as with kv_load_failure_policy fail."""
    shy: bool = False
    """Never sends usage or [DONE]."""
    tokens: Callable[[list[int], int], int] = next_token
    prefills: list[Body] = field(default_factory=list)
    generates: list[Body] = field(default_factory=list)
    scores: list[Body] = field(default_factory=list)
    """Those for a prompt's logprobs."""
    running: int = 0
    dropped: int = 0
    """Requests whose client left."""
    url: str = ""
    bootstrap_port: int | None = None
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def fetched(self) -> list[bool]:
        """Of each decode leg, whether it carried kv_transfer_params."""
        return ["kv_transfer_params" in body for body in self.generates]

    # --- the endpoints ---

    def app(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        return app

    def bootstrap_app(self) -> web.Application:
        async def query(request: web.Request) -> web.Response:
            entry = {"engine_id": f"engine-{self.name}", "worker_addr": {"0": {"0": "tcp://127.0.0.1:1"}}}
            return web.json_response({"0": entry})

        app = web.Application()
        app.router.add_get("/query", query)
        return app

    async def _health(self, request: web.Request) -> web.Response:
        self._cut_if_dead(request)
        return web.Response(status=self.health)

    async def _models(self, request: web.Request) -> web.Response:
        self._cut_if_dead(request)
        card = {"id": self.model, "object": "model", "root": "/models/x", "max_model_len": MAX_MODEL_LEN}
        loras = [
            {"id": name, "object": "model", "root": path, "parent": self.model, "max_model_len": None}
            for name, path in self.adapters.items()
        ]
        return web.json_response({"object": "list", "data": [card, *loras]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        self._cut_if_dead(request)
        body = await request.json()
        try:
            self._check(request, body)
        except ContractError as error:
            self.world.violations.append(f"{self.name}: {error}")
            return _error(400, str(error))
        if body.get("prompt_logprobs") is not None:
            self.scores.append(body)
            return web.json_response({"choices": [{"index": 0, "prompt_logprobs": _scores(body)}]})
        (self.prefills if self._is_prefill(body) else self.generates).append(body)
        if self.refusal is not None:
            return _error(*self.refusal)
        self.running += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            self._cut_if_dead(request)
            return await (self._prefill if self._is_prefill(body) else self._generate)(request, body)
        except Cut:
            raise
        except asyncio.CancelledError:
            self.dropped += 1
            if self.world.kind is HandoffKind.MOONCAKE and self._is_prefill(body):
                self.world.transfers.pop(body["kv_transfer_params"]["transfer_id"], None)
            raise
        finally:
            self.running -= 1

    def _cut_if_dead(self, request: web.Request) -> None:
        if self.dead:
            _cut(request)

    # --- the contracts ---

    def _is_prefill(self, body: Body) -> bool:
        params = body.get("kv_transfer_params")
        return isinstance(params, dict) and params.get("do_remote_decode") is True

    def _check(self, request: web.Request, body: Body) -> None:
        _must(set(body) <= FIELDS, f"unknown fields {set(body) - FIELDS}")
        _must(body["model"] in (self.model, *self.adapters), "another model")
        prompt = body["prompt"]
        _must(isinstance(prompt, list) and all(isinstance(token, int) for token in prompt), "the prompt is no tokens")
        _must(bool(request.headers.get("X-Request-Id")), "no X-Request-Id")
        _must(request.content_type == "application/json", "no JSON")
        params = body.get("kv_transfer_params")
        if body.get("prompt_logprobs") is not None:
            _must(body["stream"] is False, "`prompt_logprobs` are not available when `stream=True`.")
            _must(params is None and body["max_tokens"] == 1, "more than the prompt's logprobs")
        elif self._is_prefill(body):
            _must(self.role is Role.PREFILLER, "a prefill leg on a decoder")
            self._check_prefill(body, request.headers["X-Request-Id"])
        else:
            _must(self.role is Role.DECODER or not params, "a prefiller, which fetches from nobody, is told to")
            self._check_decode(body)

    def _check_prefill(self, body: Body, leg: str) -> None:
        params = body["kv_transfer_params"]
        _must(body["max_tokens"] == 1 and body.get("stream") is False, "a prefill leg is one token, not streamed")
        _must(body.get("min_tokens", 1) in (0, 1) and body.get("n", 1) == 1, "more than one token")
        _must("stream_options" not in body, "stream_options without a stream")
        _must(body.get("ignore_eos") is True and not body.get("stop_token_ids"), "it may end by a stop token")
        if self.world.kind is HandoffKind.NIXL:
            _must(params == NIXL_PREFILL, f"kv_transfer_params {params}")
            return
        _must(set(params) == {"do_remote_decode", "do_remote_prefill", "transfer_id"}, f"kv_transfer_params {params}")
        _must(params["do_remote_prefill"] is False and params["transfer_id"] == f"xfer-{leg}", f"{params}")
        transfer = self.world.transfers.setdefault(params["transfer_id"], Transfer())
        _must(transfer.prompt in (None, body["prompt"]), "the legs' prompts differ")
        transfer.prompt = body["prompt"]

    def _check_decode(self, body: Body) -> None:
        _must(body.get("stream") is True and body.get("return_token_ids") is True, "no stream of token ids")
        _must(all(name in body for name in SAMPLING), "generation_config's defaults would be used")
        _must(body["max_tokens"] >= 1 and 0 <= body["min_tokens"] <= body["max_tokens"], "max_tokens")
        _must(len(body["prompt"]) + body["max_tokens"] <= MAX_MODEL_LEN, "too long")
        _must("logprobs" not in body or body.get("return_tokens_as_token_ids") is True, "logprobs of texts")
        _must(body["n"] == 1 or body["temperature"] > 0, "n must be 1 when using greedy sampling")
        _must("logprob_token_ids" not in body or "logprobs" in body, "when using `logprob_token_ids`, set `logprobs`")
        _must((body["temperature"] == 0) is ("seed" not in body), "a seed goes with a temperature")
        params = body.get("kv_transfer_params")
        if params is None:
            return
        _must(body["n"] == 1, "KV can be fetched by one sequence")
        key = params.get("remote_request_id" if self.world.kind is HandoffKind.NIXL else "transfer_id")
        transfer = self.world.transfers.setdefault(str(key), Transfer())
        if self.world.kind is HandoffKind.NIXL:
            _must(params == transfer.params, f"kv_transfer_params are not what the prefill leg answered: {params}")
        else:
            names = "do_remote_prefill do_remote_decode remote_bootstrap_addr remote_engine_id transfer_id"
            _must(set(params) == set(names.split()), f"kv_transfer_params {params}")
            _must(params["do_remote_prefill"] is True and params["do_remote_decode"] is False, f"{params}")
            engine = self.world.bootstraps.get(params["remote_bootstrap_addr"])
            _must(params["remote_engine_id"] == engine, f"no such engine: {params}")
        _must(not transfer.taken, "KV that was fetched before: its blocks may be another's by now")
        _must(transfer.prompt in (None, body["prompt"]), "the legs' prompts differ")
        transfer.taken, transfer.prompt = True, body["prompt"]

    # --- the legs ---

    async def _prefill(self, request: web.Request, body: Body) -> web.Response:
        prompt = body["prompt"]
        params: Body | None = None
        if self.world.kind is HandoffKind.NIXL and self.connector:
            params = {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_block_ids": [[1, 2, 3]],
                "remote_engine_id": f"engine-{self.name}",
                "remote_request_id": f"cmpl-{request.headers['X-Request-Id']}-0-0badcafe",
                "remote_host": "127.0.0.1",
                "remote_port": 5600,
                "tp_size": 1,
                "remote_num_tokens": len(prompt),
                "transfer_mode": "pull",
            }
            self.world.transfers[str(params["remote_request_id"])] = Transfer(prompt, params)
        elif self.world.kind is HandoffKind.MOONCAKE and self.sends:
            self.world.transfers[body["kv_transfer_params"]["transfer_id"]].ready.set()
        choice = {"index": 0, "text": "x", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        answer = {"id": "cmpl-x", "object": "text_completion", "created": 1, "model": self.model, "choices": [choice]}
        return web.json_response({**answer, "usage": self._usage(prompt, 1), "kv_transfer_params": params})

    async def _generate(self, request: web.Request, body: Body) -> web.StreamResponse:
        prompt = body["prompt"]
        params = body.get("kv_transfer_params")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        await response.write(b": keep-alive\n\n")
        if params is not None and self.world.kind is HandoffKind.MOONCAKE:
            await self.world.transfers[params["transfer_id"]].ready.wait()
        error = (500, "Internal server error") if params is not None and self.load_fails else self.late_error
        if error is not None:
            body = {"message": error[1], "type": "InternalServerError", "param": None, "code": error[0]}
            await response.write(_event({"error": body}) + b"data: [DONE]\n\n")
            return response
        sent = await self._stream(request, response, body, prompt)
        if self.shy:
            await self.stop.wait()
        await response.write(_event({"choices": [], "usage": self._usage(prompt, sent)}) + b"data: [DONE]\n\n")
        return response

    async def _stream(self, request: web.Request, response: web.StreamResponse, body: Body, prompt: list[int]) -> int:
        n, max_tokens = body["n"], body["max_tokens"]
        outputs: list[list[int]] = [[] for _ in range(n)]
        open_, sent = set(range(n)), 0
        while open_:
            for index in sorted(open_):
                if self.die_after is not None and sent >= self.die_after:
                    _cut(request)
                if self.abort_after is not None and sent >= self.abort_after:
                    ending = {"index": index, "text": "", "token_ids": [], "finish_reason": "abort"}
                    await response.write(_event({"choices": [ending]}))
                    open_.discard(index)
                    continue
                seed = 0 if body["temperature"] == 0 else (body["seed"] + index) % 26
                outputs[index].append(self.tokens(prompt + outputs[index], seed))
                sent += 1
                choice = self._choice(body, prompt, outputs[index], index, max_tokens)
                if choice["finish_reason"]:
                    open_.discard(index)
                await response.write(_event({"choices": [choice]}))
            await asyncio.sleep(0)
        return sent

    def _choice(self, body: Body, prompt: list[int], output: list[int], index: int, max_tokens: int) -> Body:
        token, reason, stop = output[-1], None, None
        stops = body["stop_token_ids"]
        ends = token in stops or (token == EOS and not body["ignore_eos"])
        if ends and len(output) >= body["min_tokens"]:
            reason, stop = "stop", token if token in stops else None
        elif len(output) >= max_tokens:
            reason = "length"
        choice: Body = {
            "index": index,
            "text": "" if reason == "stop" else chr(token),
            "logprobs": None if body.get("logprobs") is None else _logprobs(token, body),
            "finish_reason": reason,
            "stop_reason": stop,
            "token_ids": [token],
        }
        if len(output) == 1:
            choice["prompt_token_ids"] = prompt
        return choice

    def _usage(self, prompt: list[int], completion: int) -> Body:
        details = {"cached_tokens": self.cached_tokens} if self.details else None
        total = len(prompt) + completion
        return {
            "prompt_tokens": len(prompt),
            "completion_tokens": completion,
            "total_tokens": total,
            "prompt_tokens_details": details,
        }


def _scores(body: Body) -> list[Body | None]:
    """As vLLM gives them: by token id, the prompt's own first."""
    told: list[Body | None] = [None]
    for row in prompt_rows(body["prompt"], body["prompt_logprobs"]):
        ranked = [(row.token_id, row.logprob, row.rank), *((t, lp, rank) for rank, (t, lp) in enumerate(row.top, 1))]
        told.append({str(t): {"logprob": lp, "rank": rank, "decoded_token": chr(t)} for t, lp, rank in ranked})
    return told


def _logprobs(token: int, body: Body) -> Body:
    """As vLLM gives them: the sampled token first, then those that are listed, or the likeliest; it is none of them."""
    others = body.get("logprob_token_ids") or [40 + rank for rank in range(body["logprobs"])]
    top = {f"token_id:{token}": -5.0} | {f"token_id:{t}": -0.1 * (at + 1) for at, t in enumerate(others)}
    return {"text_offset": [0], "token_logprobs": [-5.0], "tokens": [f"token_id:{token}"], "top_logprobs": [top]}


def _event(body: Body) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def _error(status: int, message: str) -> web.Response:
    body = {"error": {"message": message, "type": "x", "param": None, "code": status}}
    return web.json_response(body, status=status, headers={"Retry-After": "1"} if status == 503 else {})


def _cut(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()
    raise Cut


def _must(holds: bool, rule: str) -> None:
    if not holds:
        raise ContractError(rule)


def servers(kind: HandoffKind, prefillers: int = 1, decoders: int = 1) -> dict[str, FakeVllm]:
    """`p0`, `p1`, ..., `d0`, ... of one world."""
    world = World(kind)
    names = [(f"p{i}", Role.PREFILLER) for i in range(prefillers)] + [(f"d{i}", Role.DECODER) for i in range(decoders)]
    return {name: FakeVllm(name, role, world) for name, role in names}


@asynccontextmanager
async def serving(fakes: dict[str, FakeVllm]) -> AsyncIterator[None]:
    """All of them listen; `url` and `bootstrap_port` are set. Nothing that a router asked for was wrong, at the end."""
    async with AsyncExitStack() as stack:
        for fake in fakes.values():
            fake.url = await stack.enter_async_context(serve(fake.app()))
            if fake.role is Role.PREFILLER and fake.world.kind is HandoffKind.MOONCAKE:
                bootstrap = await stack.enter_async_context(serve(fake.bootstrap_app()))
                fake.bootstrap_port = int(bootstrap.rpartition(":")[2])
                fake.world.bootstraps[bootstrap] = f"engine-{fake.name}"
        yield
        for fake in fakes.values():
            fake.stop.set()
    for fake in fakes.values():
        assert fake.world.violations == []
