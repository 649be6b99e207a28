import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from tests.docs.console import ROOT

SITE = ROOT / "docs" / "site"


@pytest.fixture(scope="module")
def site() -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of docs/site/, which is no package; forget it and its siblings afterwards."""
    sys.path.insert(0, str(SITE))
    before = set(sys.modules)
    yield importlib.import_module
    sys.path.remove(str(SITE))
    for name in set(sys.modules) - before:
        if str(SITE) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
