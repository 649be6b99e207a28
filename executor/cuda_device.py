"""A CUDA device behind the interface of executor/device.py: streams, events and pinned memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from baton.core.errors import InternalError


class CudaDevice:
    """Implements `Device`; one stream copies out, one copies in, both beside the model's."""

    def __init__(self, index: int = 0) -> None:
        """Raises RuntimeError, as torch does, if there is no such device."""
        self._device = torch.device("cuda", index)
        self._out = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._in = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:
        return f"<CudaDevice {self._device}, {torch.cuda.get_device_name(self._device)}>"

    def allocate(self, size: int) -> Tensor:
        """See Device."""
        return torch.zeros(size, dtype=torch.uint8, device=self._device)

    def pin(self, memory: Tensor) -> None:
        """See Device: registers memory in place, so that it can be shared memory too."""
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        _expect_success(code, f"cannot pin {memory.nbytes} bytes of host memory")

    def unpin(self, memory: Tensor) -> None:
        """See Device."""
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        _expect_success(runtime.cudaHostUnregister(memory.data_ptr()), "cannot unpin host memory")

    def copy_to_host(self, source: Tensor, target: Tensor) -> "CudaEvent":
        """See Device; after the kernels that the caller has started under `stream`."""
        return self._copy(self._out, source, target)

    def copy_from_host(self, source: Tensor, target: Tensor) -> "CudaEvent":
        """See Device."""
        return self._copy(self._in, source, target)

    @contextmanager
    def stream(self, *, after_model: bool) -> Iterator[None]:
        """See Device."""
        stream = self._out if after_model else self._in
        if after_model:
            stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(stream):
            yield

    def synchronize(self) -> None:
        """See Device."""
        self._in.synchronize()
        self._out.synchronize()

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> "CudaEvent":
        assert source.shape == target.shape, "a copy between unequal sizes"
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            return CudaEvent(stream, source)


class CudaEvent:
    """The end of a copy: an event in the stream that it was started in."""

    def __init__(self, stream: torch.cuda.Stream, keep: Tensor) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)
        self._keep = keep
        """What is copied from; torch would give its memory to the next that asks."""

    def wait(self) -> None:
        """See Event."""
        self._event.synchronize()


def _expect_success(code: object, what: str) -> None:
    if int(code) != 0:  # type: ignore[call-overload]
        raise InternalError(f"{what}: CUDA error {code}")
