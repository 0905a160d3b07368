"""How fast something goes, as a running estimate. Pure."""


class RunningRate:
    """An estimate of units a second that follows what is observed: what took long counts more than what was short."""

    def __init__(self, weight: float = 0.2) -> None:
        """`weight`: of the latest observation."""
        self._weight = weight
        self._units = self._seconds = 0.0
        self._doubted = False

    @property
    def value(self) -> float | None:
        """None: nothing is observed yet."""
        return self._units / self._seconds if self._seconds else None

    def doubt(self) -> None:
        """It was avoided for what was observed of it, and is tried again: if the next observation is faster, it counts
        as much as all before, however long that took."""
        self._doubted = True

    def observe(self, units: float, seconds: float) -> None:
        """So many units took so long. Nothing is learnt from nothing."""
        if units <= 0 or seconds <= 0:
            return
        weight = self._weight
        if self._doubted and units * self._seconds > self._units * seconds:
            weight = max(weight, 0.5)
            self._units, self._seconds = self._units * seconds / self._seconds, seconds
        self._doubted = False
        self._units += weight * (units - self._units)
        self._seconds += weight * (seconds - self._seconds)

    def outlasted(self, units: float, seconds: float) -> None:
        """So many units were given up after so long: they take longer. It counts where they took twice what was
        expected: what is too slow ever to be measured would be believed to be fast for ever. What was merely late
        shared the way with others, and of those that were given up only the slowest are seen."""
        if self.value is None or 2 * units < self.value * seconds:
            self.observe(units, seconds)
