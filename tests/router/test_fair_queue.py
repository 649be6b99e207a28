from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from baton.router.fair_queue import PRIORITY_STEP_S, FairQueue, Turn, Waiting

TENANTS = "abcd"
ARRIVALS = st.lists(
    st.tuples(st.sampled_from(TENANTS), st.integers(1, 50), st.integers(-3, 3)), max_size=60
)
WEIGHTS = st.fixed_dictionaries({name: st.sampled_from([0.5, 1.0, 3.0]) for name in TENANTS})


def request(turn: int, tenant: str = "a", tokens: int = 10, **more: object) -> Waiting:
    values = {"weight": 1.0, "arrived": float(turn)} | more
    return Waiting(Turn(turn), tenant, tokens=tokens, **values)  # type: ignore[arg-type]


def drain(queue: FairQueue, most: int = 1 << 30) -> list[Waiting]:
    taken = []
    while len(taken) < most and (best := queue.next()) is not None:
        taken.append(queue.take(best.turn))
        queue.check()
    return taken


@given(WEIGHTS, st.lists(st.integers(1, 50), min_size=40, max_size=40), st.integers(1, 60))
def test_shares_are_those_of_the_weights_within_one_request_each(weights, sizes, count):
    """The bound of start-time fair queueing, over any time in which all have something waiting."""
    queue = FairQueue(1000)
    waiting = Counter[str]()
    for number in range(160):
        tenant = TENANTS[number % 4]
        queue.push(request(number, tenant, sizes[number // 4], weight=weights[tenant]))
        waiting[tenant] += 1
    given_to = Counter[str]()
    for taken in (drain(queue, 1)[0] for _ in range(count)):
        given_to[taken.tenant] += taken.tokens
        waiting[taken.tenant] -= 1
        if not all(waiting.values()):
            break
        shares = {name: given_to[name] / weights[name] for name in TENANTS}
        for one in TENANTS:
            for other in TENANTS:
                bound = max(sizes) / weights[one] + max(sizes) / weights[other]
                assert abs(shares[one] - shares[other]) <= bound + 1e-6


@given(WEIGHTS, ARRIVALS, st.lists(st.booleans(), max_size=120), st.integers(1, 50))
def test_nobody_is_passed_by_more_than_was_ahead_whatever_comes_later(
    weights, arrivals, turns, tokens
):
    """Of any other tenant no more is taken first than its share until then, and one request."""
    queue = FairQueue(1000)
    later = iter([*arrivals, *[("b", 50, -3)] * 40])
    for number, (tenant, size, priority) in enumerate(arrivals):
        more = {"weight": weights[tenant], "priority": priority}
        queue.push(request(number, tenant, size, **more))
    watched = request(1000, "a", tokens, weight=weights["a"], arrived=100.0, priority=0)
    own = sum(size for tenant, size, _ in arrivals if tenant == "a")
    queue.push(watched)
    number = 2000
    others = Counter[str]()
    for takes in [*turns, *[True] * 200]:
        if not takes and (new := next(later, None)) is not None:
            # Too late to pass within its own tenant, whatever its priority is.
            late = 100.0 + 7 * PRIORITY_STEP_S
            tenant, size, priority = new
            more = {"weight": weights[tenant], "priority": priority, "arrived": late}
            queue.push(request(number, tenant, size, **more))
            number += 1
            continue
        taken = drain(queue, 1)[0]
        if taken is watched:
            break
        others[taken.tenant] += taken.tokens
    assert watched.turn not in queue, "started within as many turns as requests can be ahead"
    assert others["a"] <= own
    for name in "bcd":
        share = own / weights["a"] * weights[name]
        assert others[name] <= share + 50 + 1e-6


@given(ARRIVALS, st.lists(st.integers(0, 59), max_size=30), st.integers(1, 20))
def test_each_request_is_taken_removed_or_evicted_once(arrivals, removed, most):
    queue = FairQueue(most + 1)
    seen = []
    for number, (tenant, size, priority) in enumerate(arrivals):
        queue.push(request(number, tenant, size, priority=priority))
        if len(queue) > most:
            seen.append(queue.evict().turn)
        if number in removed:
            seen += [taken.turn for taken in drain(queue, 1)]
        queue.check()
    for number in removed:
        if number in queue:
            seen.append(queue.remove(Turn(number)).turn)
    seen += [taken.turn for taken in drain(queue)]
    assert sorted(seen) == list(range(len(arrivals)))
    assert len(queue) == 0


def test_one_who_floods_the_queue_crowds_out_only_itself():
    queue = FairQueue(4)
    for number in range(3):
        queue.push(request(number, "flood"))
    queue.push(request(3, "quiet"))
    assert queue.evict().turn == 2
    assert [w.turn for w in drain(queue)] == [0, 3, 1]


def test_urgent_requests_pass_others_that_came_a_little_earlier():
    queue = FairQueue(9)
    queue.push(request(0, arrived=0.0, priority=1))
    queue.push(request(1, arrived=0.5 * PRIORITY_STEP_S))
    queue.push(request(2, arrived=1.5 * PRIORITY_STEP_S))
    assert [w.turn for w in drain(queue)] == [1, 0, 2]


def test_who_had_nothing_waiting_has_saved_nothing_up():
    queue = FairQueue(99)
    for number in range(20):
        queue.push(request(number, "a"))
    drain(queue, 10)
    for number in range(20, 30):
        queue.push(request(number, "b"))
    assert Counter(w.tenant for w in drain(queue, 10)) == {"a": 5, "b": 5}


def test_who_may_start_none_is_passed_over_and_saves_nothing_up():
    queue = FairQueue(99)
    for number in range(40):
        queue.push(request(number, "ab"[number % 2]))
    for _ in range(10):
        best = queue.next(lambda tenant: tenant == "b")
        queue.take(best.turn, lambda tenant: tenant == "b")
    assert Counter(w.tenant for w in drain(queue, 10)) == {"a": 6, "b": 4}, "one more at most"


def test_what_was_guessed_wrong_is_put_right():
    queue = FairQueue(99)
    for number in range(20):
        queue.push(request(number, "ab"[number % 2], tokens=10))
    drain(queue, 2)
    queue.correct("a", 40)
    assert [w.tenant for w in drain(queue, 5)] == ["b", "b", "b", "b", "a"]


def test_tokens_ahead_are_those_that_are_then_taken_first():
    queue = FairQueue(99)
    for number in range(20):
        queue.push(request(number, "flood"))
    queue.push(request(20, "quiet"))
    new = request(21, "quiet")
    ahead = queue.tokens_ahead(new)
    queue.push(new)
    order = [w.turn for w in drain(queue)]
    assert ahead == 10 * order.index(21)


def test_an_empty_queue_remembers_nobody():
    queue = FairQueue(9)
    queue.push(request(0, "a", tokens=1000))
    drain(queue)
    queue.push(request(1, "b"))
    queue.push(request(2, "a"))
    assert [w.turn for w in drain(queue)] == [1, 2]
    assert repr(queue) == "FairQueue(0 of 9, 0 tenants)"
