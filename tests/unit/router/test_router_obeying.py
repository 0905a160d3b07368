"""Fields that only some nodes know: they go to those, or are refused by name. Older nodes get none that they refuse."""

import msgspec
import pytest
from support.router_fakes import FakeNode, FakeNodes, make_rig

from kvcore.errors import InvalidRequestError, NodeUnavailableError
from kvcore.types import Role
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.messages import PROTOCOL, GenerateRequest, PrefillRequest
from nodeapi.sampling import SINCE, SamplingParams, lacking
from router.requests.spec import AnswerRequest, FieldNames, RequestSpec

ASKING = SamplingParams(max_tokens=2, allowed_token_ids=[97, 98])


def nodes(**protocols: int) -> FakeNodes:
    roles = {"d": Role.DECODER, "p": Role.PREFILLER}
    return FakeNodes([FakeNode(name, roles[name[0]], protocol=protocol) for name, protocol in protocols.items()])


def asked(sampling: SamplingParams = ASKING, number: int = 0) -> RequestSpec:
    return RequestSpec(request_id=f"r{number}", prompt_token_ids=[1, 2, 3], sampling=sampling)


def test_what_asks_for_nothing_is_not_sent() -> None:
    """So that a node which knows none of the later fields takes the request."""
    sampling = SamplingParams(max_tokens=4, logit_bias={7: 1.0})
    plain = GenerateRequest(request_id="a", prompt_token_ids=[1], sampling=sampling, deadline_s=1.0)
    sent = msgspec.msgpack.decode(msgspec.msgpack.encode(plain))
    assert not SINCE.keys() & sent["sampling"].keys()
    assert sent["sampling"] == {"max_tokens": 4, "logit_bias": {7: 1.0}}
    prefill = PrefillRequest(request_id="a", prompt_token_ids=[1], deadline_s=1.0)
    bare = {"request_id": "a", "prompt_token_ids": [1], "deadline_s": 1.0}
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(prefill)) == bare
    assert sampling.asks == frozenset()


def test_each_later_field_is_asked_for_by_its_value_alone() -> None:
    grammar = Grammar(kind=GrammarKind.REGEX, text="a")
    values: dict[str, object] = {
        "allowed_token_ids": [1],
        "bad_words": ["a"],
        "bad_words_token_ids": [[1]],
        "extra_args": {"a": 1},
        "grammar": grammar,
        "logprob_token_ids": [1],
        "prompt_logprobs": 0,
        "thinking_token_budget": 0,
    }
    assert values.keys() == SINCE.keys()
    for name, value in values.items():
        assert SamplingParams(max_tokens=1, **{name: value}).asks == {name}  # type: ignore[arg-type]


def test_a_node_lacks_what_came_after_it_and_what_its_engine_says() -> None:
    assert lacking(PROTOCOL) == frozenset()
    assert lacking(2) == {name for name, since in SINCE.items() if since > 2}
    assert lacking(PROTOCOL, ["bad_words", "no_field_of_ours"]) == {"bad_words"}


async def test_a_request_goes_to_a_node_that_knows_its_fields() -> None:
    rig = await make_rig(nodes(d0=2, d1=PROTOCOL))
    for number in range(6):
        route = rig.dispatcher.route(asked(number=number)).route
        assert route is not None and route.decoder == "d1"
    plain = {rig.dispatcher.route(asked(SamplingParams(max_tokens=2), number)).route.decoder for number in range(6)}  # type: ignore[union-attr]
    assert plain == {"d0", "d1"}


async def test_a_prefiller_that_knows_them_stands_in_for_decoders_that_do_not() -> None:
    rig = await make_rig(nodes(p0=PROTOCOL, d0=2))
    route = rig.dispatcher.route(asked()).route
    assert route is not None and route.decoder == "p0"


async def test_where_all_are_too_old_the_field_is_refused_by_the_clients_name_for_it() -> None:
    fakes = nodes(p0=2, d0=2)
    rig = await make_rig(fakes)
    with pytest.raises(InvalidRequestError, match=r"only_these is obeyed by none of the nodes.*version 3") as refusal:
        rig.answerer.start(AnswerRequest([asked()], names=FieldNames(others={"allowed_token_ids": "only_these"})))
    assert refusal.value.param == "only_these"
    assert fakes["d0"].generates == [] and rig.dispatcher.sequences_by_flow() == {}


async def test_an_engine_that_lacks_a_field_is_not_asked_it() -> None:
    fakes = nodes(d0=PROTOCOL)
    fakes["d0"].lacks = ["allowed_token_ids"]
    rig = await make_rig(fakes)
    with pytest.raises(InvalidRequestError, match="allowed_token_ids is obeyed by none"):
        rig.answerer.start(AnswerRequest([asked()]))
    rig.answerer.start(AnswerRequest([asked(SamplingParams(max_tokens=2))])).close()


async def test_where_the_node_that_knows_it_is_lost_the_refusal_says_what_the_others_lack() -> None:
    fakes = nodes(d0=2, d1=PROTOCOL)
    rig = await make_rig(fakes)
    decision = rig.dispatcher.route(asked())
    assert [item.reason for item in decision.left_out()] == ["cannot do what the request asks"]
    fakes["d1"].draining = True
    await rig.prober.probe()
    with pytest.raises(NodeUnavailableError, match=r"d1: draining.*d0: cannot do what the request asks"):
        rig.dispatcher.open(asked())
