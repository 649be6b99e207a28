"""An average that forgets: what was measured lately counts most."""


class MovingAverage:
    """An exponentially weighted mean of what is added."""

    def __init__(self, weight: float = 0.2) -> None:
        """`weight`, in (0, 1], is the share of the newest value."""
        assert 0 < weight <= 1, weight
        self._weight = weight
        self.value: float | None = None
        """None before the first value."""

    def __repr__(self) -> str:
        return f"MovingAverage({self.value})"

    def add(self, value: float) -> None:
        """Take in a measured value."""
        last = value if self.value is None else self.value
        self.value = last + self._weight * (value - last)
