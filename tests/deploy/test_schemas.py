"""Kinds of mistakes that strict schemas are there to find, planted one by one."""

import copy
from typing import Any

import pytest

from tests.deploy.chart import Document, of_kind, one, rendered
from tests.deploy.schemas import VERSIONS, mistakes


def ray() -> Document:
    return copy.deepcopy(one(rendered({}), "RayCluster"))


def pod(document: Document) -> Any:
    return document["spec"]["workerGroupSpecs"][0]["template"]["spec"]


def misspelt_field(document: Document) -> None:
    pod(document)["nodeSelectors"] = {}


def number_for_text(document: Document) -> None:
    pod(document)["containers"][0]["env"][0]["value"] = 0


def no_name(document: Document) -> None:
    del pod(document)["containers"][0]["name"]


def unknown_field_of_ray(document: Document) -> None:
    document["spec"]["redisAddress"] = "redis:6379"


def parameter_that_is_no_text(document: Document) -> None:
    document["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "plant",
    [misspelt_field, number_for_text, no_name, unknown_field_of_ray, parameter_that_is_no_text],
)
def test_a_planted_mistake_is_found(plant: Any, version: str) -> None:
    document = ray()
    assert not list(mistakes(document, version))
    plant(document)
    assert list(mistakes(document, version))


def test_an_unknown_kind_is_a_mistake() -> None:
    assert list(mistakes({"apiVersion": "v1", "kind": "Pood"}, VERSIONS[0]))


def test_a_misspelt_field_of_kubernetes_own_is_found() -> None:
    service = copy.deepcopy(of_kind(rendered({}), "Service")[0])
    service["spec"]["ports"][0]["targetport"] = "http"
    assert list(mistakes(service, VERSIONS[1]))
