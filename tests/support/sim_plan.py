"""What a seed stands for: sizes, requests, and a plan of faults. Pure."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from support.sim_tiers import TierPlan

from kvcore.config.schema import SimEngineConfig, StoreConfig
from kvcore.eviction.evictor import POLICY_NAMES
from nodeapi.adapters import ServedAdapter
from nodeapi.sampling import SamplingParams
from router.documents.named import NamedDocuments

CHUNK, BLOCK = 32, 8
LOAD_S = 2.5
FIRST_S = 0.5
_NODES = ("p1", "p2", "d1", "d2")
_PEERS = (*_NODES, "router", "metadata")


@dataclass(frozen=True)
class Wanted:
    """One client's request. `leaves_after`: goes away after that many tokens."""

    id: str
    at_s: float
    prompt: list[int]
    sampling: SamplingParams
    leaves_after: int | None
    salt: bytes = b""
    documents: NamedDocuments | None = None
    """As the gate has let them pass. With n = 1 (`support.sim_documents`)."""


@dataclass(frozen=True)
class Fault:
    """Something done to the cluster at a moment. `kind` names a `_do_` method of SimCluster."""

    at_s: float
    kind: str
    where: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything but the network's chances."""

    engine: SimEngineConfig
    store: StoreConfig
    segment_bytes: int
    requests: list[Wanted]
    faults: list[Fault]
    weather: float
    """How bad the network is: its usual rates of failure are multiplied by this."""
    chunk_tokens: int = CHUNK
    node_ttl_s: float = 2.0
    nodes: tuple[str, ...] = _NODES
    """Prefillers begin with p."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the segments of nodes that have other than `segment_bytes`."""
    tiers: TierPlan | None = None
    adapters: Mapping[str, Sequence[ServedAdapter]] = field(default_factory=dict)
    """That each node serves. A request names one in its salt."""


def make_plan(seed: int) -> Plan:
    """The plan of a seed."""
    dice = random.Random(seed)
    engine = SimEngineConfig(
        block_size=BLOCK,
        num_blocks=dice.choice([44, 60, 100, 200]),
        bytes_per_token=16,
        max_context=512,
        vocab_size=300,
        prefill_tokens_per_s=2000.0,
        inter_token_s=0.01,
        max_batch_tokens=dice.choice([40, 128, 400]),
        max_sequences=dice.choice([2, 4, 16]),
    )
    store = StoreConfig(
        max_replicas=dice.choice([1, 2]),
        reserve_ttl_s=dice.choice([0.5, 2.0, 5.0]),
        read_lease_s=dice.choice([0.5, 3.0]),
        retire_grace_s=0.5,
        eviction=POLICY_NAMES[seed % len(POLICY_NAMES)],
    )
    requests = _requests(dice)
    return Plan(
        engine=engine,
        store=store,
        segment_bytes=4096 * dice.choice([3, 12, 40]),
        requests=requests,
        faults=sorted(_faults(dice, requests), key=lambda fault: fault.at_s),
        weather=dice.choice([0.3, 1.0, 1.0, 5.0]),
    )


def _requests(dice: random.Random) -> list[Wanted]:
    prefixes = [[dice.randrange(1, 300) for _ in range(CHUNK * dice.choice([1, 2, 3, 4]))] for _ in range(3)]
    return [_request(dice, f"r{number}", dice.choice(prefixes)) for number in range(dice.randrange(15, 20))]


def _request(dice: random.Random, name: str, prefix: list[int]) -> Wanted:
    cut = dice.choice([len(prefix), len(prefix), dice.randrange(1, len(prefix))])
    border = dice.choice([0, 1, 2, CHUNK - 1, CHUNK, CHUNK + 1, dice.randrange(50)])
    prompt = prefix[:cut] + [dice.randrange(1, 300) for _ in range(border)]
    n = dice.choice([1, 1, 1, 2, 3])
    sampling = SamplingParams(
        temperature=dice.choice([0.0, 1.0]),
        seed=dice.randrange(1 << 40),
        max_tokens=dice.randrange(1, 32),
        n=n,
        ignore_eos=dice.random() < 0.5,
        stop_token_ids=[7] if dice.random() < 0.2 else [],
        min_tokens=dice.choice([0, 0, 1]),
    )
    leaves = dice.randrange(1, 8) if dice.random() < 0.12 else None
    return Wanted(name, FIRST_S + dice.random() * LOAD_S, prompt, sampling, leaves)


def _faults(dice: random.Random, requests: list[Wanted]) -> list[Fault]:
    """Most of them in the middle of a request's prefill or first tokens."""
    faults: list[Fault] = []
    for _ in range(dice.randrange(2, 7)):
        at_s = dice.choice(requests).at_s + dice.choice([0.02, 0.1, 0.4]) * dice.random()
        end_s = at_s + dice.choice([0.05, 0.3, 1.0, 3.0])
        match dice.choice(["node", "engine", "metadata", "cut", "cut", "part", "scribble"]):
            case "node":
                where = (dice.choice(_NODES),)
                faults += [Fault(at_s, "kill_node", where), Fault(end_s, "start_node", where)]
            case "engine":
                where = (dice.choice(_NODES),)
                faults += [Fault(at_s, "kill_engine", where), Fault(end_s, "start_engine", where)]
            case "metadata":
                faults += [Fault(at_s, "kill_metadata"), Fault(end_s, "start_metadata")]
            case "scribble":
                faults += [Fault(at_s + 0.1 * again, "scribble", (dice.choice(_NODES),)) for again in range(8)]
            case "cut":  # one way
                pair = tuple(dice.sample(_PEERS, 2))
                faults += [Fault(at_s, "cut", pair), Fault(end_s, "heal", pair)]
            case _:  # both ways
                pair = tuple(dice.sample(_PEERS, 2))
                back = (pair[1], pair[0])
                faults += [Fault(at_s, "cut", pair), Fault(at_s, "cut", back)]
                faults += [Fault(end_s, "heal", pair), Fault(end_s, "heal", back)]
    return faults


def decoder_restarts(plan: Plan) -> list[Fault]:
    """Each decoder dies some times in the middle of an answer, and is back at once or after a while."""
    dice = random.Random(repr(plan.requests[0]))
    faults: list[Fault] = []
    for _ in range(6):
        at_s = dice.choice(plan.requests).at_s + 0.3 * dice.random()
        where = (dice.choice(["d1", "d2"]),)
        back_s = at_s + dice.choice([0.01, 0.05, 0.5])
        faults += [Fault(at_s, "kill_node", where), Fault(back_s, "start_node", where)]
    return faults
