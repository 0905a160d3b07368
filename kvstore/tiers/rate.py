"""How fast something goes, as a running estimate. Pure."""


class RunningRate:
    """An estimate of units a second that follows what is observed."""

    def __init__(self, weight: float = 0.2) -> None:
        """`weight`: of the latest observation."""
        self._weight = weight
        self.value: float | None = None

    def observe(self, units: float, seconds: float) -> None:
        """So many units took so long. Nothing is learnt from nothing."""
        if units > 0 and seconds > 0:
            rate = units / seconds
            self.value = rate if self.value is None else self.value + self._weight * (rate - self.value)
