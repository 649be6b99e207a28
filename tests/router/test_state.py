import numpy as np
import pytest

from baton.core.hashing import DIGESTS, chain_hashes, prefix_root
from baton.core.instance_events import KEY_BYTES, BlockChanges, CacheTerms, InstanceLoad
from baton.router import state as columns
from baton.router.load import key_of
from baton.router.state import RouterState

TERMS = CacheTerms(16, "xxh3_128", local_prefill=True)
PROMPT = tuple(range(100, 200))
BLOCKS = 6


def told(prompt=PROMPT, blocks=BLOCKS, tenant="", name="xxh3_128", size=16) -> bytes:
    """What an instance tells of having a prompt's first blocks."""
    digest = DIGESTS[name]
    hashes = chain_hashes(prompt, size, prefix_root(tenant, digest), digest)
    return b"".join(value[:KEY_BYTES] for value in hashes[:blocks])


def all_there(stored: bytes, partition: int = 0, first: int = 0) -> BlockChanges:
    return BlockChanges(partition, first, 0, True, stored, b"")


@pytest.fixture
def state():
    state = RouterState(1000)
    yield state
    state.check()


@pytest.fixture
def known(state):
    def known(instance, prompt=PROMPT, tenant=""):
        return state.known_tokens(prompt, tenant)[state.row(key_of(instance))]

    return known


@pytest.mark.parametrize("name", DIGESTS)
def test_a_prompt_is_found_where_it_was_told_of(state, known, make_instance, name):
    one, two = make_instance("p0"), make_instance("d0")
    for instance, size, blocks in ((one, 16, 6), (two, 8, 3)):
        state.opened(key_of(instance), CacheTerms(size, name, local_prefill=False))
        stored = told(blocks=blocks, name=name, size=size)
        assert state.changed(key_of(instance), all_there(stored))
    assert (known(one), known(two)) == (96, 24)
    assert known(one, (*PROMPT[:40], 7, *PROMPT[41:])) == 32
    assert known(one, tenant="other") == 0, "tenants never share"
    assert known(one, PROMPT[:16]) == 0, "the last token is always computed"
    assert known(one, ()) == 0


def test_changes_follow_one_another_or_begin_anew(state, known, make_instance):
    instance = make_instance("p0")
    key, keys = key_of(instance), told()
    state.opened(key, TERMS)
    assert not state.changed(key, BlockChanges(0, 0, 1, False, keys[:8], b"")), "no beginning"
    assert state.changed(key, all_there(keys[:16], first=5))
    assert state.changed(key, BlockChanges(0, 5, 0, False, keys[16:32], b"")), "the rest of it"
    assert state.changed(key, BlockChanges(0, 5, 2, False, keys[32:], b""))
    assert known(instance) == 96
    assert state.changed(key, BlockChanges(0, 7, 1, False, b"", keys[24:32]))
    assert known(instance) == 48
    assert not state.changed(key, BlockChanges(0, 9, 1, False, keys[24:32], b"")), "8 is missing"
    assert state.changed(key, all_there(keys[:8], first=20))
    assert known(instance) == 16, "what was told before is forgotten"


def test_the_best_of_an_instances_partitions_counts(state, known, make_instance):
    instance = make_instance("p0")
    state.opened(key_of(instance), TERMS)
    state.changed(key_of(instance), all_there(told(blocks=2), partition=0))
    state.changed(key_of(instance), all_there(told(blocks=5), partition=1))
    assert known(instance) == 80
    state.changed(key_of(instance), all_there(b"", partition=1, first=9))
    assert known(instance) == 32


def test_loads_are_what_is_told_and_what_was_sent_since(state, make_instance):
    key = key_of(make_instance("d0"))
    rows = np.array([state.row(key)])
    assert not state.loads(rows).any()
    state.opened(key, TERMS)
    state.sent(key, tokens=10, requests=1, context=30)
    state.told(key, InstanceLoad(500, 3, 900, 4000))
    state.sent(key, tokens=7, requests=1, context=20)
    load = state.loads(rows)[0]
    assert load[[columns.SEEN, columns.QUEUED, columns.RUNNING]].tolist() == [1, 500, 3]
    assert load[[columns.SENT_TOKENS, columns.SENT_REQUESTS]].tolist() == [7, 1]
    assert load[columns.LOCAL] == 1
    state.own(key, queued=5)
    state.lost(key)
    load = state.loads(rows)[0]
    assert load[columns.OWN_QUEUED] == 5
    assert np.count_nonzero(load) == 1, "only its own work is still known"


def test_a_lost_instance_is_forgotten_and_may_come_back(state, known, make_instance):
    instance = make_instance("p0")
    key = key_of(instance)
    for _ in range(3):
        state.opened(key, TERMS)
        state.changed(key, all_there(told()))
        assert known(instance) == 96
        state.lost(key)
        assert known(instance) == 0
        state.lost(key)  # twice is once
    assert state.index.stats().retired == 3


def test_nothing_is_lost_while_the_table_grows(state, make_instance):
    keys = [key_of(make_instance(f"d{n}")) for n in range(100)]
    for n, key in enumerate(keys):
        match n % 4:
            case 0:
                state.own(key, context=n + 1)
            case 1:
                state.sent(key, context=n + 1)
            case 2:
                state.told(key, InstanceLoad(context_tokens=n + 1))
            case 3:
                state.opened(key, TERMS)
    loads = state.loads(np.array([state.row(key) for key in keys]))
    which = [columns.OWN_CONTEXT, columns.SENT_CONTEXT, columns.CONTEXT, columns.LOCAL]
    wanted = [1 if n % 4 == 3 else n + 1 for n in range(100)]
    assert [loads[n, which[n % 4]] for n in range(100)] == wanted


def test_rows_of_those_that_left_are_given_up(state, known, make_instance):
    instances = [make_instance(f"d{n}") for n in range(200)]
    keys = [key_of(i) for i in instances]
    for key in keys:
        state.row(key)
    state.opened(keys[150], TERMS)
    state.changed(keys[150], all_there(told()))
    state.own(keys[160], requests=1)
    assert not state.keep_only(keys[:150])
    assert state.keep_only(keys[:5])
    assert known(instances[150]) == 96, "who is heard of stays"
    assert state.loads(np.array([state.row(keys[160])]))[0, columns.OWN_REQUESTS] == 1
    assert state.row(keys[199]) == 7, "a new one"
