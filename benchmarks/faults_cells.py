"""The matrix of benchmarks.faults: which faults befall whom, what they cost by themselves, and how a cell is judged.

Values and pure functions. A fault is told to a system as `kind` and `whom`; a system that has no such process, or
cannot be hurt so, has no such cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.faults_load import Seen
from kvcore.config.schema import RouterConfig
from router.nodes.limits import NodeHealthLimits

BEYOND_S = 2.0
"""Of silence that a fault may cost beyond its own."""
HELD_S = 5.0
"""After the last answer nothing may be held any longer than this."""
SLOW_STEP_S, SLOW_TOKENS = 0.15, 120
"""What a node that is slow takes longer for each token, and how many an answer has at most."""
ROUTER_STOPS_S = 3.0


@dataclass(frozen=True, slots=True)
class Own:
    """What a fault costs by itself, in seconds: of silence before a first token, between two, and of a whole answer."""

    first_s: float = 0.0
    gap_s: float = 0.0
    whole_s: float = 0.0

    def __add__(self, other: "Own") -> "Own":
        return Own(self.first_s + other.first_s, self.gap_s + other.gap_s, self.whole_s + other.whole_s)


_router = RouterConfig()
HANG = Own(_router.stall_first_s, _router.stall_gap_s, _router.stall_first_s + _router.stall_gap_s)
"""After so long a silence kvferry takes a process for one that hangs; nobody can know it before."""
START = Own(15.0, 15.0, 15.0)
"""Where all nodes are killed nobody can answer before one is there again: so long with the demo model, four at a time
on two cores; with the simulated engine a third."""
ALL_NODES = frozenset({"prefill-0", "prefill-1", "decode-0", "decode-1"})
PATIENCE = NodeHealthLimits().pace_factor
OWN = {
    "kill": Own(),
    "stop": HANG,
    "hang": HANG,
    "error": Own(),
    "die": Own(),
    "late": Own(),
    "slow": Own(SLOW_STEP_S, SLOW_STEP_S, SLOW_STEP_S * SLOW_TOKENS),
    "leave": Own(),
}
"""`kill`: -9. `stop`: SIGSTOP. `hang`: its requests hang, its health answers. `error`: 500 for every request. `die`: it
breaks each stream off after ten tokens. `late`: its probes are answered after 2.5 s. `slow`: each token takes
SLOW_STEP_S more. `leave`: half of all clients go in the midst of it."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What befalls whom. `whom`: a process's name, ` engine` behind it for its engine alone; for `leave` the seconds
    after which clients go."""

    kind: str
    whom: str

    @property
    def own(self) -> Own:
        """A metadata server or a store is in nobody's way, however it fails; a router that stands still is."""
        if self.whom.startswith(("metadata", "store")):
            return Own()
        if self.whom == "router":
            return Own(ROUTER_STOPS_S, ROUTER_STOPS_S, ROUTER_STOPS_S)
        return OWN[self.kind]


@dataclass(frozen=True, slots=True)
class Cell:
    """Faults that come together."""

    name: str
    faults: tuple[Fault, ...] = ()

    @property
    def own(self) -> Own:
        """Of all together."""
        killed = {fault.whom for fault in self.faults if fault.kind == "kill"}
        return sum((fault.own for fault in self.faults), START if killed >= ALL_NODES else Own())

    @property
    def leave_s(self) -> float | None:
        """After which half of the clients go."""
        return next((float(fault.whom) for fault in self.faults if fault.kind == "leave"), None)


def cell(text: str) -> Cell:
    """`kill decode-0 engine + stop metadata-server`."""
    faults = []
    for part in filter(None, text.split(" + ")):
        kind, _, whom = part.partition(" ")
        faults.append(Fault(kind, whom))
    return Cell(text or "none", tuple(faults))


def cells(*texts: str) -> list[Cell]:
    return [cell(text) for text in texts]


ONE_NODE = [
    f"{kind} {node}" for kind in ("kill", "stop", "error", "hang", "slow", "late") for node in ("prefill-0", "decode-0")
]
OF_A_CLUSTER = cells(
    "",
    *ONE_NODE,
    *(f"{kind} {node} engine" for kind in ("kill", "stop") for node in ("prefill-0", "decode-0")),
    *(f"{kind} {name}" for kind in ("kill", "stop") for name in ("metadata-server", "store-0")),
    "stop router",
    "leave 0.8",
    "hang prefill-0 + leave 0.8",
    "late decode-0 + late decode-1",
    "kill prefill-0 + kill prefill-1",
    "stop prefill-0 + stop prefill-1",
    "kill decode-0 + kill decode-1",
    "kill prefill-0 + kill decode-0",
    "kill prefill-0 + kill prefill-1 + kill decode-0 + kill decode-1",
    "kill prefill-0 + stop metadata-server",
    "kill decode-0 + kill metadata-server",
    "stop decode-0 + kill decode-1",
    "stop decode-0 + stop decode-1",
    "hang prefill-0 + hang decode-0",
    "error decode-0 + error decode-1",
    "slow decode-0 + kill metadata-server",
    "stop prefill-0 engine + stop metadata-server",
    "stop decode-0 engine + stop metadata-server",
)
"""Of kvferry's own: two prefillers, two decoders, a store, a metadata server, a router."""

OF_SERVERS = cells(
    "",
    *ONE_NODE,
    "die decode-0",
    "stop router",
    "leave 0.3",
    "hang prefill-0 + leave 0.3",
    "kill prefill-0 + kill prefill-1",
    "kill prefill-0 + kill decode-0",
    "stop prefill-0 + kill decode-0",
    "hang prefill-0 + hang decode-0",
    "die decode-0 + die decode-1",
)
"""Of a router in front of servers that are not its own."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one cell. `held`: what was still held HELD_S after the last answer; empty: nothing."""

    cell: str
    answered: int
    wanted: int
    same: int
    took: Own
    """The longest first token, gap and whole answer."""
    held: str
    problems: tuple[str, ...]
    """What is not as promised; empty: the cell passes."""


def normal(seen: Sequence[Seen]) -> Own:
    """What everything takes in a cell without a fault."""
    streams = [one for one in seen if one.streamed]
    return Own(
        max((one.first_s for one in streams), default=0.0),
        max((one.silence_s for one in streams), default=0.0),
        max((one.total_s for one in seen if not one.streamed), default=0.0),
    )


def judge(subject: Cell, seen: Sequence[Seen], texts: Sequence[str], held: str, usual: Own) -> Verdict:
    """`texts`: the right ones, by number. `usual`: what is normal here."""
    stayed = [one for one in seen if not one.left]
    answered = [one for one in stayed if not one.problem]
    same = [one for one in answered if one.text == texts[one.number]]
    took, problems = normal(stayed), []
    if len(answered) < len(stayed):
        example = next(one.problem for one in stayed if one.problem)
        problems.append(f"{len(stayed) - len(answered)} not answered ({example})")
    if len(same) < len(answered):
        problems.append(f"{len(answered) - len(same)} other texts")
    own = subject.own + usual
    if own.first_s >= HANG.first_s:  # it has so much longer for what it is known to compute
        own += Own(PATIENCE * usual.first_s, 0.0, PATIENCE * usual.first_s)
    for what, took_s, own_s in (
        ("first token", took.first_s, own.first_s),
        ("gap", took.gap_s, own.gap_s),
        ("whole answer", took.whole_s, own.whole_s),
    ):
        if took_s > own_s + BEYOND_S:
            problems.append(f"{what} {took_s:.1f} s, more than {own_s + BEYOND_S:.1f}")
    if held:
        problems.append(f"held: {held}")
    return Verdict(subject.name, len(answered), len(stayed), len(same), took, held, tuple(problems))
