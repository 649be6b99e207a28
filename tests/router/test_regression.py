import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.router.regression import Regression

PRIOR, MOST = (2e-3, 1e-4, 1e-9), (10.0, 1.0, 1e-3)


def features(tokens: int) -> tuple[float, float, float]:
    return 1.0, float(tokens), tokens * tokens / 2


def true_s(tokens: int, factor: float = 1.0) -> float:
    return factor * float(np.dot(features(tokens), (5e-3, 4e-5, 6e-9)))


def fitted(rng: random.Random, model: Regression, count: int, factor: float = 1.0) -> None:
    for _ in range(count):
        tokens = rng.randrange(10, 4000)
        model.add(features(tokens), true_s(tokens, factor) * rng.uniform(0.9, 1.1))


def test_it_learns_and_goes_on_learning_when_things_change():
    rng, model = random.Random(3), Regression(PRIOR, MOST)
    fitted(rng, model, 200)
    for tokens in (200, 1000, 3500):
        assert model.predict(np.array(features(tokens))) == pytest.approx(true_s(tokens), rel=0.15)
    fitted(rng, model, 400, factor=3.0)
    for tokens in (200, 1000, 3500):
        wanted = pytest.approx(true_s(tokens, 3.0), rel=0.2)
        assert model.predict(np.array(features(tokens))) == wanted


def test_one_outlier_moves_it_little():
    rng, model = random.Random(3), Regression(PRIOR, MOST)
    fitted(rng, model, 200)
    before = model.predict(np.array(features(1000)))
    model.add(features(1000), 3600.0)
    assert model.predict(np.array(features(1000))) == pytest.approx(before, rel=0.3)


def test_nonsense_is_not_taken_in():
    model = Regression(PRIOR, MOST)
    for x, y in (
        (features(10), math.nan),
        (features(10), math.inf),
        (features(10), -1.0),
        ((1.0, math.nan, 0.0), 1.0),
        ((0.0, 0.0, 0.0), 1.0),
    ):
        model.add(x, y)
    assert model.count == 0
    assert model.coefficients.tolist() == pytest.approx(PRIOR)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 20), st.floats(0, 1e6)),
        max_size=60,
    )
)
def test_whatever_is_measured_it_stays_in_its_bounds(measured):
    model = Regression(PRIOR, MOST)
    for tokens, seconds in measured:
        model.add(features(tokens), seconds)
    found = model.coefficients
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert (found <= np.array(MOST) * (1 + 1e-9)).all()
    for tokens in (1, 1000, 1 << 20):
        assert model.predict(np.array(features(tokens))) >= 0


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(1, 4000))
def test_the_same_again_and_again_is_predicted(seed, tokens):
    """Nothing else is ever measured: the other directions stay as they were, and do not wind up."""
    model = Regression(PRIOR, MOST)
    seconds = true_s(tokens, 1 + seed / 100)
    for _ in range(300):
        model.add(features(tokens), seconds)
    assert model.predict(np.array(features(tokens))) == pytest.approx(seconds, rel=0.05)
    other = model.predict(np.array(features(2 * tokens)))
    assert 0 <= other <= 20 * seconds + 1
