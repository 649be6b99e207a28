"""Ranks and their places."""

from itertools import product

import pytest

from baton.core.errors import InvalidConfig
from baton.parallel.mesh import AXES, Axis, Mesh, Place

MESHES = [Mesh(*sizes) for sizes in [*product((1, 2), repeat=5), (3, 2, 1, 2, 4), (2, 1, 3, 1, 5)]]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_rank_and_place_are_each_others_inverse(mesh: Mesh) -> None:
    assert [mesh.place(rank) for rank in range(mesh.size)] == list(mesh.places)
    assert [mesh.rank(place) for place in mesh.places] == list(range(mesh.size))


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_lines_cut_the_mesh_into_equal_parts(mesh: Mesh, axis: Axis) -> None:
    lines = mesh.lines(axis)
    assert sorted(rank for line in lines for rank in line) == list(range(mesh.size))
    assert {len(line) for line in lines} == {mesh.length(axis)}
    for line in lines:
        for at, rank in enumerate(line):
            assert mesh.line(rank, axis) == line
            assert getattr(mesh.place(rank), axis) == at


def test_the_fastest_axis_has_neighbours() -> None:
    mesh = Mesh(pp=2, tp=2)
    assert mesh.lines("tp") == ((0, 1), (2, 3))
    assert mesh.lines("pp") == ((0, 2), (1, 3))
    assert mesh.place(3) == Place(pp=1, tp=1)


def test_a_mesh_is_named_by_what_is_more_than_one() -> None:
    assert str(Mesh()) == "tp1"
    assert str(Mesh(pp=2, tp=4)) == "pp2tp4"


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_has_at_least_one_rank(axis: Axis) -> None:
    with pytest.raises(InvalidConfig, match=f"{axis}: 0 is not allowed"):
        Mesh(**{axis: 0})
