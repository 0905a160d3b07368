"""What a model's `generation_config.json` makes of requests that say nothing, as vLLM's server takes it."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.router_fakes import Rig, make_rig

from kvcore.errors import ModelLoadError
from nodeapi.sampling import SamplingParams
from router.text.model_habits import SamplingDefaults, read_sampling

QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2], "min_p": None}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


def written(folder: Path, said: object) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(said))
    return folder


async def sampled(rig: Rig, path: str, **fields: object) -> SamplingParams:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        reply = await http.post(path, json=fields)
    assert reply.status_code == 200, reply.text
    (request,) = [request for node in rig.nodes.nodes for request in node.generates]
    return request.sampling


def test_what_the_file_says_holds_and_what_it_leaves_out_is_openais(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == SamplingDefaults()
    found = read_sampling(written(tmp_path, {**QWEN, "repetition_penalty": 1.05, "max_new_tokens": 2048}))
    wanted = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05, "max_new_tokens": 2048}
    assert found == SamplingDefaults(**wanted)  # type: ignore[arg-type]
    assert found.others() == wanted


@pytest.mark.parametrize("said", [{"temperature": "hot"}, {"top_k": 1.5}, []])
def test_a_damaged_file_is_named(tmp_path: Path, said: object) -> None:
    with pytest.raises(ModelLoadError, match=r"generation_config\.json"):
        read_sampling(written(tmp_path, said))


async def test_a_request_that_says_nothing_is_sampled_as_the_model_wants() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20, top_p=0.95, presence_penalty=1.5, max_new_tokens=7)
    sampling = await sampled(await make_rig(sampling=defaults), "/v1/chat/completions", **CHAT, temperature=None)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.6, 20, 0.95)
    assert (sampling.presence_penalty, sampling.max_tokens) == (1.5, 7)


async def test_what_a_request_says_counts_and_a_completion_has_sixteen_tokens() -> None:
    defaults = SamplingDefaults(temperature=0.6, top_k=20, max_new_tokens=7)
    rig = await make_rig(sampling=defaults)
    sampling = await sampled(rig, "/v1/completions", prompt="hello", temperature=0, top_k=0)
    assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.0, 0, 16)
    rig = await make_rig(sampling=defaults)
    assert (await sampled(rig, "/v1/chat/completions", **CHAT, max_tokens=9)).max_tokens == 9
