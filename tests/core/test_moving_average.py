from baton.core.moving_average import MovingAverage


def test_it_begins_as_a_mean_and_then_follows_the_later_values() -> None:
    average = MovingAverage(weight=0.4)
    average.fade(0.5)
    assert average.value is None
    seen = []
    for value in (8.0, 4.0, 1.0):
        average.add(value)
        seen.append(average.value)
    assert seen == [8.0, 6.0, 4.0]  # the last by 0.4, and no longer by a third
    average.fade(0.5)
    assert average.value == 2.0
