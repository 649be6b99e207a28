from baton.executor.room import Room, common_room


def test_all_ranks_use_what_each_has_room_for() -> None:
    rooms = [Room(90, (1, 2, 4, 8)), Room(70, (2, 4, 16)), Room(80, (1, 2, 4))]
    assert common_room(rooms) == Room(70, (2, 4))
    assert common_room([Room(5), Room(6, (1,))]) == Room(5)


def test_it_travels() -> None:
    assert Room.unpack(Room(7, (1, 4)).pack()) == Room(7, (1, 4))
