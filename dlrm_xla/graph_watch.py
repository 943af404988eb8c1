"""A watch over the one-graph rule: what was compiled when, and what ran on the CPU instead of the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from dlrm_xla.batches import PackedBatch
from dlrm_xla.device import Counters, Device


@dataclass
class GraphWatch:
    """Counts compiles and CPU fallbacks, and says at which step which rule was broken.

    A run compiles one train graph, at its first step, one evaluation graph, and none to refresh bags. Whatever comes
    later, and every operation that xla hands to the CPU, is a broken rule.
    """

    device: Device
    warn: Callable[[str], None] = lambda line: None
    compiles: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)
    _seen: Counters = Counters()

    def __post_init__(self) -> None:
        self._seen = self.device.counters()

    def after(self, phase: str, step: int, graphs: int = 1) -> None:
        """Looks at the counters after a step of a phase, whose first step may compile so many ``graphs``."""
        broken = len(self.broken)
        now = self.device.counters()
        new = now.compiles - self._seen.compiles
        if new:
            had = self.compiles.get(phase, 0)
            self.compiles[phase] = had + new
            if had or new > graphs:
                self.broken.append(f"{phase} step {step}: compiled {had + new} graphs where {graphs} is enough")
        for name, count in now.fallbacks.items():
            more = count - self._seen.fallbacks.get(name, 0)
            if more and name not in self.fallbacks:
                self.broken.append(f"{phase} step {step}: {name} runs on the CPU instead of the device")
            if more:
                self.fallbacks[name] = self.fallbacks.get(name, 0) + more
        self._seen = now
        for line in self.broken[broken:]:
            self.warn(f"one-graph rule broken: {line}")


def phase(name: str, packed: PackedBatch) -> str:
    """What a step's graph is counted under: one for each of a few lengths of bags."""
    return name if packed.lengths is None else f"{name}, {sum(packed.lengths)} slots"
