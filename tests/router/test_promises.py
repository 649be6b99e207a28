import numpy as np
import pytest

from baton.router.fleet import Pool
from baton.router.load import key_of
from baton.router.promises import Promises
from baton.router.state import RouterState


@pytest.fixture
def pool(make_instance):
    instances = [make_instance("decode-0"), make_instance("decode-1")]
    return Pool(instances, RouterState(1 << 10), salt="")


def test_the_tightest_of_those_that_are_there_counts(pool, make_instance):
    promises = Promises()
    first = pool.keys[0]
    for tpot_s in (0.05, 0.02, 0.02, None):
        promises.came(first, tpot_s)
    promises.came(key_of(make_instance("elsewhere")), 0.001)
    assert promises.tightest(pool).tolist() == [0.02, np.inf]
    for expected in (0.02, 0.05):
        promises.left(first, 0.02)
        assert promises.tightest(pool).tolist() == [expected, np.inf]
    promises.left(first, None)
    promises.left(first, 0.05)
    assert promises.tightest(pool).tolist() == [np.inf, np.inf]
    assert len(promises) == 1
