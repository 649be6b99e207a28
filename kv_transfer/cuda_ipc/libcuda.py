"""The CUDA driver, bound by ctypes: exported memory, streams, copies and events of one device.

The driver's API and not torch's reductions: those need a counter in shared memory for each tensor
and pickle what they send, and here the pool is exported once, for as long as the process lives.
The device's primary context is the one that torch uses, so addresses are the same in both.
"""

import ctypes as c
from functools import cache
from typing import Any

from baton.core.errors import TransportError
from baton.kernels.native.kv_digest import Ints
from baton.kernels.run_copy import RunCopier

_INT, _SIZE, _PTR, _ADDRESS = c.c_int, c.c_size_t, c.c_void_p, c.c_uint64
_HANDLE_BYTES = 64


class _Handle(c.Structure):
    """CUipcMemHandle."""

    _fields_ = (("reserved", c.c_ubyte * _HANDLE_BYTES),)


class _Uuid(c.Structure):
    """CUuuid."""

    _fields_ = (("bytes", c.c_ubyte * 16),)


_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "cuInit": (c.c_uint,),
    "cuDeviceGet": (c.POINTER(_INT), _INT),
    "cuDeviceGetUuid_v2": (c.POINTER(_Uuid), _INT),
    "cuDevicePrimaryCtxRetain": (c.POINTER(_PTR), _INT),
    "cuCtxSetCurrent": (_PTR,),
    "cuMemGetAddressRange_v2": (c.POINTER(_ADDRESS), c.POINTER(_SIZE), _ADDRESS),
    "cuIpcGetMemHandle": (c.POINTER(_Handle), _ADDRESS),
    "cuIpcOpenMemHandle_v2": (c.POINTER(_ADDRESS), _Handle, c.c_uint),
    "cuIpcCloseMemHandle": (_ADDRESS,),
    "cuStreamCreate": (c.POINTER(_PTR), c.c_uint),
    "cuStreamSynchronize": (_PTR,),
    "cuStreamDestroy_v2": (_PTR,),
    "cuMemcpyAsync": (_ADDRESS, _ADDRESS, _SIZE, _PTR),
    "cuEventCreate": (c.POINTER(_PTR), c.c_uint),
    "cuEventRecord": (_PTR, _PTR),
    "cuEventSynchronize": (_PTR,),
    "cuEventDestroy_v2": (_PTR,),
    "cuGetErrorName": (_INT, c.POINTER(c.c_char_p)),
}
"""All return a CUresult, 0 if it went well, and release the interpreter's lock meanwhile."""

_LAZY_PEER_ACCESS = 1
_NON_BLOCKING = 1
_BLOCKING_SYNC, _NO_TIMING = 1, 2

_SHORT = 1 << 20
"""Runs shorter than this are copied together by one kernel: a copy of each costs the host some
microseconds, in which a GPU moves about as much."""
_FEW = 4
"""So many at most are copied one by one whatever their length."""
_OFFSET = 8
"""Bytes of what precedes the driver's handle in ours: where in the allocation the memory begins."""


class LibCuda:
    """The functions of one libcuda, which raise TransportError when they fail."""

    def __init__(self, path: str) -> None:
        try:
            self._library = c.CDLL(path)
            for name, arguments in _FUNCTIONS.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, _INT
        except (OSError, AttributeError) as error:
            raise TransportError(f"CUDA's driver cannot be used: {error}") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises TransportError with the driver's own name of what went wrong."""
        code = getattr(self._library, name)(*arguments)
        if code != 0:
            words = c.c_char_p()
            self._library.cuGetErrorName(code, c.byref(words))
            said = words.value.decode() if words.value else "unknown"
            raise TransportError(f"{name}: {said} ({code})")


@cache
def load(path: str = "libcuda.so.1") -> LibCuda:
    """Return the library, loaded once; raises TransportError if this machine has none."""
    return LibCuda(path)


class CudaDriver:
    """Implements `DeviceDriver`."""

    def __init__(self, index: int, library: LibCuda, copy_short: RunCopier | None) -> None:
        """`copy_short` copies many short runs by one kernel; without it each is a copy of its own.

        Raises TransportError if there is no device of this number.
        """
        self._index = index
        self._cuda = library
        self._copy_short = copy_short
        device, context, uuid = _INT(), _PTR(), _Uuid()
        library.call("cuDeviceGet", c.byref(device), index)
        library.call("cuDevicePrimaryCtxRetain", c.byref(context), device)
        library.call("cuDeviceGetUuid_v2", c.byref(uuid), device)
        self._context = context
        self._uuid = bytes(uuid.bytes).hex()

    def __repr__(self) -> str:
        return f"<CudaDriver {self._index}, {self.identity}>"

    @property
    def identity(self) -> str:
        """See DeviceDriver."""
        return f"GPU {self._uuid}"

    def attach(self) -> None:
        """See DeviceDriver; every method below does so itself."""
        self._cuda.call("cuCtxSetCurrent", self._context)

    def export(self, address: int, length: int) -> bytes:
        """See DeviceDriver. Memory mapped piece by piece (expandable segments) has no handle."""
        self.attach()
        base, size, handle = _ADDRESS(), _SIZE(), _Handle()
        self._cuda.call("cuMemGetAddressRange_v2", c.byref(base), c.byref(size), address)
        offset = address - base.value
        if offset + length > size.value:
            raise TransportError(f"{length} bytes are not of one allocation of {size.value}")
        self._cuda.call("cuIpcGetMemHandle", c.byref(handle), base.value)
        return offset.to_bytes(_OFFSET, "big") + bytes(handle.reserved)

    def open(self, handle: bytes, length: int) -> "_Memory":
        """See DeviceDriver. The device must be the owner's, or reach it."""
        if len(handle) != _OFFSET + _HANDLE_BYTES:
            raise TransportError(f"a handle of {len(handle)} bytes is none of CUDA's")
        self.attach()
        base, size = _ADDRESS(), _SIZE()
        theirs = _Handle.from_buffer_copy(handle, _OFFSET)
        self._cuda.call("cuIpcOpenMemHandle_v2", c.byref(base), theirs, _LAZY_PEER_ACCESS)
        memory = _Memory(self, base.value, int.from_bytes(handle[:_OFFSET], "big"))
        try:
            self._cuda.call("cuMemGetAddressRange_v2", None, c.byref(size), base.value)
            if memory.offset + length > size.value:
                raise TransportError(f"the peer's allocation has {size.value} bytes, too few")
        except BaseException:
            memory.close()
            raise
        return memory

    def open_lane(self) -> "_Lane":
        """See DeviceDriver."""
        self.attach()
        stream = _PTR()
        self._cuda.call("cuStreamCreate", c.byref(stream), _NON_BLOCKING)
        return _Lane(self, stream)

    # For its memory and its lanes.

    def call(self, name: str, *arguments: Any) -> None:
        """Call the driver, with this device current in the calling thread."""
        self.attach()
        self._cuda.call(name, *arguments)

    def copy(self, targets: Ints, sources: Ints, lengths: Ints, stream: c.c_void_p) -> None:
        """Begin to copy runs on `stream`."""
        short = lengths < _SHORT
        kernel = self._copy_short
        by_kernel = kernel is not None and int(short.sum()) > _FEW
        if kernel is not None and by_kernel:
            kernel(targets[short], sources[short], lengths[short], stream.value or 0)
            left = ~short
            targets, sources, lengths = targets[left], sources[left], lengths[left]
        self.attach()
        for row in zip(targets.tolist(), sources.tolist(), lengths.tolist(), strict=True):
            self._cuda.call("cuMemcpyAsync", *row, stream)


class _Memory:
    """See OpenedMemory."""

    def __init__(self, driver: CudaDriver, base: int, offset: int) -> None:
        self._driver = driver
        self._base = base
        self.offset = offset
        """In the allocation."""

    @property
    def address(self) -> int:
        """See OpenedMemory."""
        return self._base + self.offset

    def close(self) -> None:
        """See OpenedMemory."""
        self._driver.call("cuIpcCloseMemHandle", self._base)


class _Lane:
    """See CopyLane: a stream that waits for no other."""

    def __init__(self, driver: CudaDriver, stream: c.c_void_p) -> None:
        self._driver = driver
        self._stream = stream

    def copy(self, targets: Ints, sources: Ints, lengths: Ints) -> "_Event":
        """See CopyLane."""
        self._driver.copy(targets, sources, lengths, self._stream)
        event = _PTR()
        self._driver.call("cuEventCreate", c.byref(event), _BLOCKING_SYNC | _NO_TIMING)
        self._driver.call("cuEventRecord", event, self._stream)
        return _Event(self._driver, event)

    def close(self) -> None:
        """See CopyLane."""
        try:
            self._driver.call("cuStreamSynchronize", self._stream)
        finally:
            self._driver.call("cuStreamDestroy_v2", self._stream)


class _Event:
    """See CopyEvent: an event on which the host sleeps rather than spins."""

    def __init__(self, driver: CudaDriver, event: c.c_void_p) -> None:
        self._driver = driver
        self._event = event

    def __del__(self) -> None:
        self._driver.call("cuEventDestroy_v2", self._event)

    def wait(self) -> None:
        """See CopyEvent."""
        self._driver.call("cuEventSynchronize", self._event)
