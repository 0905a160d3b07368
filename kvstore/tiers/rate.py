"""How fast something goes, as a running estimate. Pure."""


class RunningRate:
    """An estimate of units a second that follows what is observed: what took long counts more than what was short."""

    def __init__(self, weight: float = 0.2) -> None:
        """`weight`: of the latest observation."""
        self._weight = weight
        self._units = self._seconds = 0.0

    @property
    def value(self) -> float | None:
        """None: nothing is observed yet."""
        return self._units / self._seconds if self._seconds else None

    def observe(self, units: float, seconds: float) -> None:
        """So many units took so long. Nothing is learnt from nothing."""
        if units > 0 and seconds > 0:
            self._units += self._weight * (units - self._units)
            self._seconds += self._weight * (seconds - self._seconds)
