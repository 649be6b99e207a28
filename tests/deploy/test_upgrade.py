"""A new version of the chart, and back to the old one: nothing that Kubernetes would refuse.

What a change of each value does is in test_values.py.
"""

import copy
import re
import shutil

import pytest

from tests.deploy.chart import CHART, EVERYTHING, example, groups, of_kind, one, rendered
from tests.deploy.test_render import CASES
from tests.deploy.upgrade import broken

NEWER = "99.9.9"


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The chart as it is, with a later version of its own and of Baton."""
    folder = tmp_path_factory.mktemp("newer") / "baton"
    shutil.copytree(CHART, folder)
    chart = folder / "Chart.yaml"
    text = re.sub(r"^((?:appV|v)ersion): .*$", rf"\1: {NEWER}", chart.read_text(), flags=re.M)
    chart.write_text(text)
    return str(folder)


@pytest.mark.parametrize("case", CASES)
def test_versions_of_the_chart_can_follow_each_other_in_both_directions(
    case: str, newer: str
) -> None:
    before, after = rendered(example(case)), rendered(example(case), chart=newer, is_upgrade=True)
    names = [{(d["kind"], d["metadata"]["name"]) for d in found} for found in (before, after)]
    assert names[0] == names[1], "an object that is left out is deleted"
    assert not list(broken(before, after))
    versions = {d["metadata"]["labels"]["app.kubernetes.io/version"] for d in after}
    assert versions == {NEWER}


def test_a_new_version_changes_nothing_in_pods_but_their_image(newer: str) -> None:
    before, after = groups(rendered(EVERYTHING)), groups(rendered(EVERYTHING, chart=newer))
    for old, new in zip(before, after, strict=True):
        template = copy.deepcopy(new.template)
        for container in (
            *template["spec"]["containers"],
            *template["spec"].get("initContainers", []),
        ):
            assert container["image"] == f"baton:{NEWER}"
            container["image"] = old.ray["image"]
        assert template == old.template


def test_an_upgrade_leaves_to_others_how_large_a_pool_is() -> None:
    pools = of_kind(rendered(EVERYTHING), "BatonPool")
    assert len(pools) == 4
    assert all("replicas" not in pool["spec"] for pool in pools)


@pytest.mark.parametrize("planted", ["StatefulSet", "PersistentVolumeClaim", "RoleBinding"])
def test_a_planted_change_is_found(planted: str) -> None:
    before = rendered(EVERYTHING)
    after = copy.deepcopy(before)
    changed = of_kind(after, planted)[0]
    if planted == "RoleBinding":
        changed["roleRef"]["name"] = "other"
    elif planted == "StatefulSet":
        changed["spec"]["selector"]["matchLabels"]["version"] = "2"
    else:
        changed["spec"]["accessModes"] = ["ReadOnlyMany"]
    assert len(list(broken(before, after))) == 1
    assert not list(broken(before, before))
    assert one(after, "RayCluster") == one(before, "RayCluster")
