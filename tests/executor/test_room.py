from baton.executor.room import Room, common_room


def test_all_ranks_use_what_each_has_room_for() -> None:
    rooms = [Room(90, (1, 2, 4, 8)), Room(70, (2, 4, 16)), Room(80, (1, 2, 4))]
    assert common_room(rooms) == Room(70, (2, 4))
    assert common_room([Room(5), Room(6, (1,))]) == Room(5)
    assert common_room([Room(5, (), (8, 64)), Room(6, (1,), (64, 128))]) == Room(5, (), (64,))


def test_it_travels() -> None:
    for room in (Room(7, (1, 4)), Room(7, (1, 4), (64, 128))):
        assert Room.unpack(room.pack()) == room
