import asyncio
from dataclasses import replace

from baton.core.ids import Incarnation, InstanceId, new_incarnation, new_ticket
from baton.core.topology import InstanceInfo, Membership, MembershipBoard, Role


def instance(name: str, role: Role) -> InstanceInfo:
    return InstanceInfo(
        instance_id=InstanceId(name),
        role=role,
        address="127.0.0.1:1",
        incarnation=Incarnation(1),
        pid=1,
        model="demo",
        compatibility="c",
        max_model_len=100,
        kv_tokens=1000,
        max_sequences=4,
        load_s=0.0,
    )


P, D, M = (
    instance(name, role)
    for name, role in (("p", Role.PREFILL), ("d", Role.DECODE), ("m", Role.MIXED))
)


def test_instances_by_role():
    membership = Membership(1, (P, D, M))
    assert membership.of(Role.PREFILL) == (P,)
    assert membership.of(Role.DECODE, Role.MIXED) == (D, M)
    assert membership.of() == ()


def test_without_is_the_next_version():
    membership = Membership(4, (P, D, M))
    assert membership.without(D.instance_id) == Membership(5, (P, M))
    assert membership.without(InstanceId("nobody")) == Membership(5, (P, D, M))


def test_only_a_higher_version_replaces():
    board = MembershipBoard(Membership(2, (P,)))
    for stale in (Membership(1, (D,)), Membership(2, (D,))):
        board.publish(stale)
        assert board.current == Membership(2, (P,))
    board.publish(Membership(5, (D,)))
    assert board.current == Membership(5, (D,))


async def test_readers_wait_for_a_newer_one_and_all_get_it():
    board = MembershipBoard()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        readers = [group.create_task(board.newer_than(v)) for v in (0, 0, 1)]
        await asyncio.sleep(0)
        board.publish(Membership(1, (P,)))
        assert await readers[0] == await readers[1] == Membership(1, (P,))
        assert not readers[2].done()
        board.publish(Membership(2, (D,)))
    assert readers[2].result() == Membership(2, (D,))


async def test_a_reader_that_comes_late_gets_the_latest_at_once():
    board = MembershipBoard()
    board.publish(Membership(1, (P,)))
    board.publish(Membership(3, (D,)))
    async with asyncio.timeout(5):
        assert (await board.newer_than(0)).version == 3
        assert (await board.newer_than(2)).version == 3


async def test_a_stale_publication_wakes_nobody_for_nothing():
    board = MembershipBoard(Membership(3))
    waiting = asyncio.create_task(board.newer_than(3))
    await asyncio.sleep(0)
    board.publish(Membership(3, (P,)))
    await asyncio.sleep(0)
    assert not waiting.done()
    board.publish(Membership(4, (P,)))
    assert (await waiting).instances == (P,)


def test_a_board_of_one_model_follows_the_whole():
    whole = MembershipBoard(Membership(1, (P,)))
    part, other = whole.serving("demo"), whole.serving("other")
    assert (part.current, other.current) == (Membership(1, (P,)), Membership(1))
    elsewhere = replace(D, model="other")
    whole.publish(Membership(2, (P, elsewhere)))
    assert (part.current, other.current) == (Membership(2, (P,)), Membership(2, (elsewhere,)))


def test_names_are_drawn_afresh():
    incarnations = {new_incarnation() for _ in range(100)}
    assert len(incarnations) > 95
    assert all(0 < value < 2**63 for value in incarnations)
    tickets = {new_ticket() for _ in range(100)}
    assert len(tickets) == 100
    assert {len(ticket) for ticket in tickets} == {16}
