"""Late, doubled, swapped, missing and stray volumes, with a clock that the tests hold."""

from collections.abc import Iterable

import numpy as np
import pytest

from rtfmri.errors import VolumeError
from rtfmri.ordering import FAR, Gap, Ordering, Stray
from rtfmri.volume import Grid, Volume

GRID = Grid((1, 1, 1), np.eye(4))
VOXEL = np.ones((1, 1, 1), np.int16, order="F")


def volume(index: int, arrived_s: float = 0.0) -> Volume:
    return Volume(VOXEL, GRID, index, 2.0, arrived_s=arrived_s, decoded_s=arrived_s)


def told(items: Iterable[Volume | Gap | Stray]) -> list[object]:
    """Return volumes as their numbers."""
    return [item.index if isinstance(item, Volume) else item for item in items]


def feed(ordering: Ordering, *indices: int) -> list[object]:
    """Give one volume a second, and return what is let go."""
    found: list[object] = []
    for second, index in enumerate(indices):
        ordering.put(volume(index, float(second)))
        found += told(ordering.ready(float(second)))
    return found


def test_in_order_nothing_waits() -> None:
    ordering = Ordering(4, 1.0)
    assert feed(ordering, 0, 1, 2) == [0, 1, 2]
    assert ordering.due_s() is None
    assert ordering.n_reordered == 0


def test_swapped_volumes_are_swapped_back() -> None:
    ordering = Ordering(4, 10.0)
    assert feed(ordering, 1, 0, 2, 5, 4, 3, 6) == [0, 1, 2, 3, 4, 5, 6]
    assert ordering.n_reordered == 3


def test_a_gap_is_given_up_when_its_time_is_over() -> None:
    ordering = Ordering(4, 2.5)
    assert feed(ordering, 0, 3) == [0]
    assert ordering.due_s() == 3.5
    assert told(ordering.ready(3.4)) == []
    assert told(ordering.ready(3.5)) == [Gap(1, 2, at_start=False), 3]
    assert str(Gap(1, 2, at_start=False)) == "volumes 1 to 2"
    assert str(Gap(1, 1, at_start=False)) == "volume 1"


def test_a_gap_is_given_up_when_too_many_wait() -> None:
    ordering = Ordering(2, None)
    assert feed(ordering, 0, 2, 3) == [0]
    assert ordering.due_s() is None
    ordering.put(volume(4))
    assert told(ordering.ready(0.0)) == [Gap(1, 1, at_start=False), 2, 3, 4]


def test_a_window_of_none_waits_for_none() -> None:
    assert feed(Ordering(0, None), 0, 2, 3) == [0, Gap(1, 1, at_start=False), 2, 3]


def test_the_end_lets_all_go() -> None:
    ordering = Ordering(4, None)
    assert feed(ordering, 0, 2, 5) == [0]
    assert told(ordering.ready(0.0, ended=True)) == [
        Gap(1, 1, at_start=False),
        2,
        Gap(3, 4, at_start=False),
        5,
    ]


def test_a_run_may_be_joined_late() -> None:
    ordering = Ordering(4, 2.0)
    assert feed(ordering, 500, 501, 502) == [Gap(0, 499, at_start=True), 500, 501, 502]
    with pytest.raises(VolumeError, match="given up"):
        ordering.put(volume(499))


@pytest.mark.parametrize("again", [0, 2, 3])
def test_what_came_before_is_refused(again: int) -> None:
    ordering = Ordering(4, 10.0)
    feed(ordering, 0, 2, 3)
    with pytest.raises(VolumeError, match="came twice"):
        ordering.put(volume(again))


def test_what_comes_after_it_was_given_up_is_refused() -> None:
    ordering = Ordering(1, None)
    feed(ordering, 0, 3, 4)
    for late in (1, 2):
        with pytest.raises(VolumeError, match="after it was given up"):
            ordering.put(volume(late))


def test_one_absurd_number_does_not_end_the_run() -> None:
    ordering = Ordering(4, 1.0)
    assert feed(ordering, 0, 1_000_000, 1, 2, 3) == [0, 1, Stray(1_000_000), 2, 3]
    ordering.put(volume(500_000, 9.0))
    assert ordering.due_s() is None
    assert told(ordering.ready(1e6)) == []
    assert ordering.n_reordered == 0


def test_a_scanner_that_comes_back_after_long_is_believed() -> None:
    ordering = Ordering(4, 1.0)
    after = FAR + 50
    assert feed(ordering, 0, after) == [0]
    ordering.put(volume(after + 1, 5.0))
    assert told(ordering.ready(5.0)) == [Gap(1, after - 1, at_start=False), after, after + 1]


def test_any_order_within_the_window_gives_the_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        # Each volume comes at most three places from its own.
        indices = np.argsort(np.arange(30) + rng.uniform(0, 3, 30)).tolist()
        assert feed(Ordering(4, None), *indices) == list(range(30))
