from baton.core.moving_average import MovingAverage


def test_it_begins_with_the_first_value_and_follows_the_later_ones() -> None:
    average = MovingAverage(weight=0.5)
    assert average.value is None
    seen = []
    for value in (8.0, 4.0, 4.0):
        average.add(value)
        seen.append(average.value)
    assert seen == [8.0, 6.0, 5.0]
