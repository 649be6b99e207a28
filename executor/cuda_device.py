"""A CUDA device behind the interface of executor/device.py: streams, events and pinned memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from baton.core.errors import InternalError, TransportError
from baton.core.log import get_logger
from baton.kernels.run_copy import gpu_run_copier
from baton.kv_transfer.cuda_ipc.libcuda import CudaDriver, load
from baton.kv_transfer.device_driver import DeviceDriver

_log = get_logger(__name__)


class CudaDevice:
    """Implements `Device`; one stream copies out, one copies in, both beside the model's."""

    def __init__(self, index: int = 0) -> None:
        """Raises RuntimeError, as torch does, if there is no such device."""
        self._device = torch.device("cuda", index)
        self._out = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._in = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._driver = _driver(index)

    def __repr__(self) -> str:
        return f"<CudaDevice {self._device}, {torch.cuda.get_device_name(self._device)}>"

    @property
    def driver(self) -> DeviceDriver | None:
        """See Device."""
        return self._driver

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
        with torch.cuda.device(self._device):
            code = runtime.cudaHostUnregister(memory.data_ptr())
        _expect_success(code, "cannot unpin host memory")

    def copy_to_host(self, source: Tensor, target: Tensor) -> "CudaEvent":
        """See Device; after the kernels that the caller has started under `stream`."""
        return self._copy(self._out, source, target)

    def copy_from_host(self, source: Tensor, target: Tensor) -> "CudaEvent":
        """See Device."""
        return self._copy(self._in, source, target)

    def record(self) -> "CudaEvent":
        """See Device."""
        with torch.cuda.device(self._device):
            return CudaEvent(torch.cuda.current_stream(self._device))

    @contextmanager
    def stream(self, *, outward: bool) -> Iterator[None]:
        """See Device."""
        with torch.cuda.stream(self._out if outward else self._in):
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
    """An event in a stream: the end of all that was started there before."""

    def __init__(self, stream: torch.cuda.Stream, keep: Tensor | None = None) -> None:
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)
        self._keep = keep
        """What is copied from; torch would give its memory to the next that asks."""

    @property
    def done(self) -> bool:
        """See Event."""
        return bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """See Event."""
        self._event.synchronize()


def _driver(index: int) -> DeviceDriver | None:
    """Return how transports reach the device; None, with a warning, if they cannot."""
    try:
        return CudaDriver(index, load(), gpu_run_copier(index))
    except (TransportError, ImportError) as error:
        _log.warning("device.not_shared", device=index, reason=str(error))
        return None


def _expect_success(code: object, what: str) -> None:
    if int(code) != 0:  # type: ignore[call-overload]
        raise InternalError(f"{what}: CUDA error {code}")
