"""Which executor computes a model is chosen once, and said with its reason."""

from pathlib import Path

import pytest

from baton.core.errors import InvalidConfig
from baton.kernels.native.build import NoNativeCode
from baton.models import loader
from baton.models.decoder import Decoder
from baton.models.loader import load_model
from baton.models.native import NativeDecoder


def none_here() -> None:
    raise NoNativeCode("no C++ compiler found")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "load_library", none_here)


def test_native_where_it_can_be_had(tiny_llama_dir: Path) -> None:
    try:
        loader.load_library()
    except NoNativeCode as error:
        pytest.skip(str(error))
    model = load_model(tiny_llama_dir, threads=2)
    assert isinstance(model, NativeDecoder)
    assert model.executor.startswith("native, ")
    assert model.executor.endswith(", 2 threads")


@pytest.mark.usefixtures("no_compiler")
def test_torch_without_a_compiler(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir)
    assert isinstance(model, Decoder)
    assert model.executor == "torch (no C++ compiler found)"


@pytest.mark.usefixtures("no_compiler")
def test_native_that_cannot_be_had_is_refused(tiny_llama_dir: Path) -> None:
    with pytest.raises(InvalidConfig, match="no C\\+\\+ compiler") as error:
        load_model(tiny_llama_dir, executor="native")
    assert error.value.field == "executor"


def test_torch_if_asked_for_or_in_float16(tiny_llama_dir: Path) -> None:
    assert load_model(tiny_llama_dir, executor="torch").executor == "torch (as asked for)"
    half = load_model(tiny_llama_dir, dtype="float16")
    why = "native code computes in float32 or bfloat16, not in float16"
    assert half.executor == f"torch ({why})"


def test_native_in_bfloat16(tiny_llama_dir: Path) -> None:
    try:
        model = load_model(tiny_llama_dir, dtype="bfloat16", executor="native")
    except InvalidConfig as error:
        pytest.skip(str(error))
    assert isinstance(model, NativeDecoder)
    assert model.dtype == "bfloat16"
    assert "bfloat16" in model.executor


def test_an_executor_that_does_not_exist(tiny_llama_dir: Path) -> None:
    with pytest.raises(InvalidConfig, match="auto, native, torch"):
        load_model(tiny_llama_dir, executor="gpu")
