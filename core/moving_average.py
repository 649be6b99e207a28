"""An average that forgets: what was measured lately counts most."""


class MovingAverage:
    """An exponentially weighted mean of what is added; of the first few values a plain mean."""

    def __init__(self, weight: float = 0.2) -> None:
        """`weight`, in (0, 1], is the share of the newest value."""
        assert 0 < weight <= 1, weight
        self._weight = weight
        self._count = 0
        self.value: float | None = None
        """None before the first value."""

    def __repr__(self) -> str:
        return f"MovingAverage({self.value})"

    def add(self, value: float) -> None:
        """Take in a measured value."""
        self._count += 1
        last = value if self.value is None else self.value
        self.value = last + max(self._weight, 1 / self._count) * (value - last)

    def fade(self, factor: float) -> None:
        """Multiply it by `factor`: what is not measured again loses its weight."""
        if self.value is not None:
            self.value *= factor
