"""vLLM's requests and scheduler outputs as the scheduler half's values: block tables, and parameters of requests."""

from types import SimpleNamespace

import pytest
from support.store_fakes import SPEC

from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.orders import PARAMS_NAME, LegParams
from engines.vllm.connector.scheduler_side import SchedulerSide
from engines.vllm.connector.settings import ConnectorSettings, Provenance
from kvcore.chunk_keys import adapted_salt, adapter_identity
from kvcore.config.schema import StoreConfig, TransportConfig
from kvstore.settings import KVStoreSettings
from metadata_server.connect import MetadataEndpoints

SETTINGS = ConnectorSettings(
    store=KVStoreSettings(
        node_id="d",
        incarnation=1,
        host_id="h",
        metadata=MetadataEndpoints(urls=("http://127.0.0.1:9",), timeout_s=1.0),
        transport=TransportConfig(),
        store=StoreConfig(),
    ),
    chunk_tokens=SPEC.chunk_tokens,
    save_output=True,
    provenance=Provenance(model_id="m", weights_digest="w", tokenizer_digest="t", attention="a"),
)


@pytest.fixture
def side():
    side = SchedulerSide(SETTINGS, SPEC, SPEC.chunk_tokens, ConnectorLimits(), share_loads=True)
    yield side
    side.close()


def request(name="r", **fields) -> SimpleNamespace:
    """A vllm.v1.request.Request of a few tokens."""
    given = {
        "request_id": name,
        "all_token_ids": [1, 2, 3],
        "num_prompt_tokens": 3,
        "kv_transfer_params": None,
        "lora_request": None,
        "mm_features": [],
        "prompt_embeds": None,
        "cache_salt": None,
        "sampling_params": object(),
        "skip_reading_prefix_cache": False,
    }
    return SimpleNamespace(**given | fields)


def output(new=(), cached=(), resumed=()) -> SimpleNamespace:
    """A SchedulerOutput. `new`: (request, blocks); `cached`: (request, new blocks or None)."""
    names = [name for name, _ in [*new, *cached]]
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=0) for name, blocks in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, _ in cached],
            new_block_ids=[None if blocks is None else (blocks,) for _, blocks in cached],
            num_computed_tokens=[1] * len(cached),
            resumed_req_ids=set(resumed),
        ),
        num_scheduled_tokens=dict.fromkeys(names, 1),
        preempted_req_ids=None,
    )


def test_block_tables_begin_grow_begin_anew_after_a_preemption_and_end(side, monkeypatch):
    tables: list[dict[str, list[int]]] = []
    build = side.half.build

    def noting(scheduled, preempted):
        tables.append({part.request_id: list(part.block_ids) for part in scheduled})
        return build(scheduled, preempted)

    monkeypatch.setattr(side.half, "build", noting)
    for name in ("r", "s"):
        side.arrived(request(name))
        side.half.allocated(name, [], 0)
    side.build(output(new=[("r", [1, 2]), ("s", [7])]))
    side.build(output(cached=[("r", [3]), ("s", None)]))
    side.build(output(cached=[("r", [8, 9])], resumed=["r"]))
    assert tables == [{"r": [1, 2], "s": [7]}, {"r": [1, 2, 3], "s": [7]}, {"r": [8, 9]}]
    side.finished("r", holds_blocks=True)
    assert side._tables == {"s": [7]}
    assert repr(side).startswith("<SchedulerSide <SchedulerHalf 0 waiting, 0 loading, 1 running>, <StoreLookup of 1")


@pytest.mark.parametrize(
    ("params", "understood"),
    [
        (None, None),
        ({"another": 1}, None),
        ({PARAMS_NAME: {"leg": "leg", "salt": "00ff"}}, LegParams(leg="leg", salt="00ff")),
        ({PARAMS_NAME: {"leg": "leg", "salt": "no hex"}}, None),
        ({PARAMS_NAME: {"leg": "leg", "unknown": 1}}, None),
    ],
)
def test_a_requests_parameters_are_ours_or_nobodys(side, params, understood):
    side.arrived(request(kv_transfer_params=params))
    assert side.half._requests["r"].view.params == understood


@pytest.mark.parametrize(
    "field",
    [
        {"lora_request": object()},
        {"mm_features": [object()]},
        {"prompt_embeds": object()},
        {"sampling_params": None},
    ],
    ids=lambda field: next(iter(field)),
)
def test_kv_that_depends_on_more_than_tokens_is_not_cached(side, field):
    side.arrived(request(**field))
    assert not side.half._requests["r"].view.cacheable


def test_an_adapters_kv_is_cached_under_the_salt_that_names_it_alone(side):
    """The engine makes the salt. Where it names none, or nobody says what it is of, nothing is loaded and saved."""
    salt = adapted_salt(adapter_identity("a", b"files"), b"tenant")
    named, bare = ({PARAMS_NAME: {"leg": "r", "salt": one.hex()}} for one in (salt, b"tenant"))
    cases = [(named, object(), True), (named, None, False), (bare, object(), False), (bare, None, True)]
    for number, (params, adapter, cacheable) in enumerate(cases):
        side.arrived(request(f"r{number}", kv_transfer_params=params, lora_request=adapter))
        assert side.half._requests[f"r{number}"].view.cacheable is cacheable
    side.arrived(request("theirs", lora_request=object(), cache_salt=salt.decode()))
    assert not side.half._requests["theirs"].view.cacheable


def test_kv_of_a_request_that_reads_no_cache_is_saved(side):
    """One with prompt_logprobs, say. vLLM itself loads nothing for it, whatever it is told."""
    side.arrived(request(skip_reading_prefix_cache=True))
    arrived = side.half._requests["r"]
    assert arrived.view.cacheable and not arrived.may_load and not arrived.asked, "and nothing is looked up for it"


def test_each_reset_takes_an_identity_that_nobody_else_has(side):
    """Another engine that was reset as often may hold other weights."""
    other = SchedulerSide(SETTINGS, SPEC, SPEC.chunk_tokens, ConnectorLimits(), share_loads=True)
    roots = {side._chain(b"").root}
    assert other._chain(b"").root in roots
    for reset in (side, side, other, other):
        reset.reset()
        roots.add(reset._chain(b"").root)
    other.close()
    assert len(roots) == 5
    assert side._chain(b"tenant").root not in roots
