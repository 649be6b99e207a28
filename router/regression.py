"""Coefficients fitted online: recursive least squares that forgets, within bounds.

    y ≈ θ · x,    each measurement moves θ by P x (y - θ x) / (λ + xᵀ P x)

P is how unsure θ still is in each direction; forgetting (λ < 1) lets it grow, so that θ follows a
system that changes. Three bounds keep it sane whatever is measured: P's eigenvalues do not grow
without end where nothing new is learned ("wind-up"), one measurement counts as no more than some
multiple of what errors usually are (Huber), and θ stays in a box.
See Ljung, "System Identification", 2nd edition, chapter 11.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_FORGET = 0.98
"""A measurement counts a third after fifty more."""
_MOST_UNSURE = 10.0
"""Of any direction, at the start as well: θ is in units of the prior, which is no wild guess."""
_OUTLIER = 4.0
"""Errors beyond so many usual ones are cut to that."""
_ERROR_WEIGHT = 0.1


class Regression:
    """y as a sum of features times coefficients, none of which is negative: costs add up."""

    def __init__(self, prior: Sequence[float], most: Sequence[float]) -> None:
        """`prior` is believed before anything was measured; `most` is where coefficients end."""
        self._prior = np.array(prior, np.float64)
        self._most = np.array(most, np.float64)
        assert (self._prior <= self._most).all(), (prior, most)
        assert (self._prior > 0).all(), prior
        self._theta = np.ones_like(self._prior)
        """In units of the prior, so that features of any size are alike."""
        self._p = np.eye(len(prior)) * _MOST_UNSURE
        self._error: float | None = None
        self.count = 0
        """Measurements taken in."""

    def __repr__(self) -> str:
        return f"Regression({self.coefficients.tolist()}, {self.count} measured)"

    @property
    def coefficients(self) -> Vector:
        """Return the coefficients, one per feature."""
        return self._theta * self._prior

    @property
    def usual_error(self) -> float | None:
        """Return by how much the last predictions were off, as a share of what the prior says."""
        return self._error

    def predict(self, features: Vector) -> Vector:
        """Return y for rows of features (n, d), or for one row (d)."""
        result: Vector = features @ self.coefficients
        return result

    def add(self, features: Sequence[float], measured: float) -> None:
        """Take in a measurement; what is not a finite number says nothing."""
        x = np.array(features, np.float64) * self._prior
        if not (math.isfinite(measured) and np.isfinite(x).all()) or measured < 0 or not x.any():
            return
        # Large prompts must not count for more than small ones by their size alone.
        size = float(np.abs(x).sum())
        x /= size
        error = self._cut(measured / size - float(x @ self._theta))
        px = self._p @ x
        gain = px / (_FORGET + float(x @ px))
        most = self._most / self._prior
        self._theta = np.clip(self._theta + gain * error, 0.0, most)
        p = (self._p - np.outer(gain, px)) / _FORGET
        sizes, directions = np.linalg.eigh((p + p.T) / 2)
        self._p = (directions * np.clip(sizes, 0.0, _MOST_UNSURE)) @ directions.T
        self.count += 1

    def _cut(self, error: float) -> float:
        usual = self._error
        size = abs(error)
        if usual is None:
            self._error = size
            return error
        limit = _OUTLIER * max(usual, 1e-9)
        cut = min(size, limit)
        self._error = usual + _ERROR_WEIGHT * (cut - usual)
        return math.copysign(cut, error)
