"""Who computes follows from the device and from what is installed, and nothing else."""

import importlib.util

import pytest
import torch

from baton.core.errors import InvalidConfig
from baton.kernels import backend
from baton.kernels.backend import Backend, choose_backend, triton_on, triton_serves, using_backend

CPU, GPU = torch.device("cpu"), torch.device("meta")


def test_torch_computes_on_the_cpu() -> None:
    assert choose_backend("cpu", batch_invariant=True).backend is Backend.TORCH
    with using_backend(Backend.TRITON):
        assert not triton_on(CPU), "for tensors on the host, whatever the model is on"
        assert triton_serves(torch.empty(1, device=GPU))
    assert not triton_on(GPU)


def test_kernels_are_interpreted_on_the_cpu_if_they_are_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "INTERPRETED", True)
    with using_backend(Backend.TRITON):
        assert triton_on(CPU)


@pytest.mark.parametrize(("installed", "expected"), [(True, "triton"), (False, "torch")])
def test_triton_computes_on_a_gpu_if_it_is_installed(
    installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    choice = choose_backend("cuda:1")
    assert choice.backend == expected
    assert "Triton" in choice.why


def test_a_gpu_is_not_batch_invariant() -> None:
    with pytest.raises(InvalidConfig, match=r"batch_invariant: 'true'.*false on cuda"):
        choose_backend("cuda", batch_invariant=True)


def test_a_backend_is_used_for_a_while_whatever_comes_of_it() -> None:
    with pytest.raises(KeyError), using_backend(Backend.TRITON):
        raise KeyError
    assert not triton_on(GPU)
