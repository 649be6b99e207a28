"""What Kubernetes refuses to change in an object that is there, so that no upgrade may try to.

A rollback is an upgrade in the other direction: what may not change is compared, not ordered.
"""

from collections.abc import Iterator
from typing import Any

from tests.deploy.chart import Document

_STATEFUL_SET = ("replicas", "template", "updateStrategy", "minReadySeconds", "ordinals")
"""Of its spec, what may change."""


def frozen(document: Document) -> Any:
    """Return what of an object must stay as it is; None if all may change."""
    match document["kind"]:
        case "StatefulSet":
            return {k: v for k, v in document["spec"].items() if k not in _STATEFUL_SET}
        case "PersistentVolumeClaim":
            return document["spec"]  # a request may grow, but then it can never be rolled back
        case "RoleBinding":
            return document["roleRef"]
        case "CustomResourceDefinition":
            return document["spec"]["scope"], document["spec"]["group"]
    return None


def broken(before: list[Document], after: list[Document]) -> Iterator[str]:
    """Find the objects that are in both, and of which something changes that may not."""
    there = {(d["kind"], d["metadata"]["name"]): d for d in before}
    for document in after:
        key = (document["kind"], document["metadata"]["name"])
        if key in there and frozen(there[key]) != frozen(document):
            yield f"{key[0]} {key[1]}: {frozen(there[key])} becomes {frozen(document)}"
