"""Whether documents of a kind are reused, by what that has cost of late. Pure.

A kind is how a client names its documents; each is judged apart for each model. It is turned off by a window of
comparisons, and on again by a person alone. Every change has a number that grows by one: of two routers that say
different things of a kind the greater number is right, of equal ones `off` is. Invariant: what is turned begins with an
empty window, so that it is judged anew.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import msgspec

from kvcore.config.kv.settings import BlendConfig
from metadata_server.cache_messages import KindSwitch
from router.shadow.judging import at_most
from router.shadow.limits import BlendGateLimits
from router.shadow.reports import BlendReport, KindReport


class Judged(NamedTuple):
    """What is judged apart from all else."""

    model: str
    kind: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.model}"


@dataclass(slots=True)
class _Kind:
    switch: KindSwitch
    kl: deque[float] = field(default_factory=deque)
    agreement: deque[float] = field(default_factory=deque)
    compared: int = 0


class BlendGate:
    """One a router. `wall`: Unix seconds, for people."""

    def __init__(
        self, config: BlendConfig, wall: Callable[[], float], limits: BlendGateLimits = BlendGateLimits()
    ) -> None:
        self._config, self._wall, self._limits = config, wall, limits
        self._kinds: dict[Judged, _Kind] = {}
        self.on_change: list[Callable[[], None]] = []
        """Called when a kind was turned off or on here."""
        self.unheard = ""
        """Why it is not known what was turned before this router began, in one sentence; empty: it is."""

    def __repr__(self) -> str:
        return f"<BlendGate {self._config.mode}, {len(self._kinds)} kinds, off: {', '.join(self._off()) or 'none'}>"

    @property
    def mode(self) -> str:
        """As in the cluster file."""
        return self._config.mode

    def why_off(self, model: str, kind: str) -> str:
        """Why the gate keeps documents of this kind from being reused, in one sentence; empty: it does not."""
        if self.unheard:
            return self.unheard
        if (known := self._known(Judged(model, kind))) is None:
            return "more models and kinds than can be judged"
        return f"turned off, until `kvferry blend on`: {known.switch.off}" if known.switch.off else ""

    def problem(self) -> str | None:
        """A sentence for people while some kind is off; None: none is."""
        if self.mode == "off":
            return None
        if self.unheard:
            return f"documents are not reused: {self.unheard}"
        if not (off := self._off()):
            return None
        return (
            f"documents are not reused, as that changed answers too much: {', '.join(off)}; see `kvferry blend status`"
        )

    def compared(self, model: str, kind: str, kl: float, agreement: float) -> str:
        """A request with documents of this kind was computed both ways: divergence of the first token (nats) and the
        share of tokens that are the same. Returns why the kind is off now, if this has turned it off; else empty."""
        one, limits, config = self._known(Judged(model, kind)), self._limits, self._config
        if one is None:
            return ""
        one.compared += 1
        if one.switch.off:  # it was asked before it was turned off
            return ""
        for values, value in ((one.kl, at_most(kl, limits.most_nats)), (one.agreement, agreement)):
            values.append(value)
            if len(values) > limits.window:
                values.popleft()
        if len(one.kl) < limits.judged_from:
            return ""
        mean_kl, mean_agreement = fmean(one.kl), fmean(one.agreement)
        if mean_kl <= config.max_kl and mean_agreement >= config.min_agreement:
            return ""
        why = (
            f"over {len(one.kl)} comparisons the first token diverged by {mean_kl:.3g} nats (at most "
            f"{config.max_kl:g}) and {mean_agreement:.0%} of tokens agreed (at least {config.min_agreement:.0%})"
        )
        self._turn(one, why)
        return why

    def turn_on(self, kinds: Iterable[str] | None = None) -> list[str]:
        """By a person's order, for every model. None: all kinds. Returns what was off. Raises KeyError for a kind that
        is not known."""
        known = {judged.kind for judged in self._kinds}
        chosen = known if kinds is None else set(kinds)
        if unknown := sorted(chosen - known):
            raise KeyError(unknown[0])
        turned = [(judged, one) for judged, one in sorted(self._kinds.items()) if judged.kind in chosen]
        turned = [(judged, one) for judged, one in turned if one.switch.off]
        for _, one in turned:
            self._turn(one, "")
        return [str(judged) for judged, _ in turned]

    def report(self) -> BlendReport:
        """All that is known."""
        config = self._config
        return BlendReport(
            mode=config.mode,
            k=config.k,
            max_kl=config.max_kl,
            min_agreement=config.min_agreement,
            shadow=config.shadow,
            kinds=[_report(one) for _, one in sorted(self._kinds.items())],
        )

    # --- other routers ---

    def switches(self) -> list[KindSwitch]:
        """What is to be told: of all that was ever turned."""
        return [one.switch for one in self._kinds.values() if one.switch.number]

    def told(self, switches: Sequence[KindSwitch]) -> list[KindSwitch]:
        """Another router says this. Returns what has changed here by it."""
        changed = list[KindSwitch]()
        for said in switches:
            one = self._known(Judged(said.model, said.kind))
            if one is None or said.order <= one.switch.order:
                continue
            if bool(said.off) != bool(one.switch.off):
                changed.append(said)
            self._put(one, said)
        return changed

    def _off(self) -> list[str]:
        return [str(judged) for judged, one in sorted(self._kinds.items()) if one.switch.off]

    def _known(self, judged: Judged) -> _Kind | None:
        """None: there are too many already."""
        if judged not in self._kinds and len(self._kinds) >= self._limits.kinds:
            return None
        return self._kinds.setdefault(judged, _Kind(KindSwitch(model=judged.model, kind=judged.kind)))

    def _turn(self, one: _Kind, off: str) -> None:
        before = one.switch
        self._put(one, msgspec.structs.replace(before, number=before.number + 1, off=off, at=self._wall()))
        for tell in self.on_change:
            tell()

    def _put(self, one: _Kind, switch: KindSwitch) -> None:
        one.switch = switch
        one.kl.clear()
        one.agreement.clear()


def _report(one: _Kind) -> KindReport:
    return KindReport(
        model=one.switch.model,
        kind=one.switch.kind,
        off=one.switch.off,
        since=one.switch.at,
        compared=one.compared,
        window=len(one.kl),
        kl=fmean(one.kl) if one.kl else None,
        agreement=fmean(one.agreement) if one.agreement else None,
    )
