"""What checks of this machine are given and what they answer. Values only; see `doctor` and `doctor_vllm`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from kvcore.config.checks import engine_of
from kvcore.config.schema import ClusterConfig, EngineConfig, TorchEngineConfig, VllmEngineConfig
from kvferry.doctor.running import RunningParts
from kvferry.machine import is_local


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `remedy` is set iff `ok` is False."""

    subject: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """What the checks look at. `all_here`: every process is to run on this machine (`kvferry up`). `running`: what
    of the cluster runs already; only `kvferry doctor` looks."""

    config: ClusterConfig
    all_here: bool = False
    running: RunningParts = field(default_factory=RunningParts)

    def local_engines(self) -> Iterator[tuple[str, EngineConfig]]:
        """Engines of the nodes that belong on this machine, by the nodes' names."""
        for name, node in self.config.nodes.items():
            engine = engine_of(self.config, node)
            if engine is not None and (self.all_here or is_local(node.host)):
                yield name, engine

    @property
    def uses_torch(self) -> bool:
        """Whether any node of the cluster runs the torch engine."""
        nodes = self.config.nodes.values()
        return any(isinstance(engine_of(self.config, node), TorchEngineConfig) for node in nodes)

    @property
    def local_vllm(self) -> dict[str, VllmEngineConfig]:
        """The vLLM engines among `local_engines`."""
        return {name: engine for name, engine in self.local_engines() if isinstance(engine, VllmEngineConfig)}


Check = Callable[[Context], Sequence[Finding]]
