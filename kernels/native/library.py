"""The compiled library, and its structures as Python sees them (kernels/native/program.h)."""

import ctypes
import functools
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum

from baton.kernels.native.build import NoNativeCode, build


class Kind(IntEnum):
    """What an operation does."""

    PLACE = 0
    ANGLES = 1
    EMBED = 2
    NORM = 3
    LINEAR = 4
    HEADS = 5
    ATTEND = 6
    GATE = 7
    ADD = 8
    PICK = 9
    SOFTCAP = 10
    LATENT = 11
    BY_HEAD = 12
    ROUTE = 13
    GROUP = 14
    SPREAD = 15
    EXPERTS = 16
    COMBINE = 17


class Format(IntEnum):
    """What a packed matrix holds."""

    FLOAT32 = 0
    BFLOAT16 = 1
    PAIRS = 2
    """bfloat16 for products in bfloat16: see bfloat16.h."""


class Stored(IntEnum):
    """What a tensor in a checkpoint's file holds."""

    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2


class Gate(IntEnum):
    """Gates of feed-forward layers."""

    SILU = 0
    GELU_TANH = 1
    CLAMPED_SWIGLU = 2


class Matrix(ctypes.Structure):
    """A packed weight matrix."""

    _fields_ = (
        ("panels", c_void_p),
        ("inputs", c_int64),
        ("outputs", c_int64),
        ("format", c_int32),
    )


class Source(ctypes.Structure):
    """Rows of a tensor as they lie in memory; strides are in values."""

    _fields_ = (
        ("data", c_void_p),
        ("rows", c_int64),
        ("row_stride", c_int64),
        ("column_stride", c_int64),
        ("stored", c_int32),
    )


class Op(ctypes.Structure):
    """One operation; which fields count follows from its kind."""

    _fields_ = (
        ("kind", c_int32),
        ("sampled", c_int32),
        ("layer", c_int32),
        ("x", c_int32),
        ("y", c_int32),
        ("out", c_int32),
        ("x_at", c_int32),
        ("out_at", c_int32),
        ("x_step", c_int32),
        ("out_step", c_int32),
        ("width", c_int32),
        ("top_k", c_int32),
        ("table", c_int32),
        ("heads", c_int32),
        ("window", c_int32),
        ("gate", c_int32),
        ("stored", c_int32),
        ("scale", c_float),
        ("eps", c_float),
        ("alpha", c_float),
        ("limit", c_float),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("matrix", Matrix),
    )


class Scoring(IntEnum):
    """How a mixture's router turns scores into weights."""

    SOFTMAX = 0
    SIGMOID = 1
    TOP_SOFTMAX = 2


class Routing(ctypes.Structure):
    """How a token chooses its experts."""

    _fields_ = (
        ("experts", c_int32),
        ("top_k", c_int32),
        ("scoring", c_int32),
        ("normalise", c_int32),
        ("scale", c_float),
        ("groups", c_int32),
        ("top_groups", c_int32),
        ("correction", c_void_p),
    )


class Rotation(ctypes.Structure):
    """Frequencies of a rotary embedding."""

    _fields_ = (("frequencies", c_void_p), ("pairs", c_int32), ("magnitude", c_float))


class PoolShape(ctypes.Structure):
    """How a layer lies in the KV pool."""

    _fields_ = (
        ("block_stride", c_int64),
        ("parts", c_int32),
        ("kv_heads", c_int32),
        ("block_size", c_int32),
        ("head_dim", c_int32),
    )


class Plan(ctypes.Structure):
    """A program and the pool that it runs on."""

    _fields_ = (
        ("ops", POINTER(Op)),
        ("op_count", c_int32),
        ("widths", POINTER(c_int32)),
        ("spreads", POINTER(c_int32)),
        ("buffer_count", c_int32),
        ("rotations", POINTER(Rotation)),
        ("rotation_count", c_int32),
        ("vocabulary", c_int32),
        ("blocks", c_int64),
        ("pool", PoolShape),
        ("layer_stride", c_int64),
        ("pairs", c_int32),
    )


class SequenceRows(ctypes.Structure):
    """New tokens of one sequence in a step, and its block table."""

    _fields_ = (
        ("row", c_int32),
        ("rows", c_int32),
        ("length", c_int32),
        ("blocks", c_void_p),
    )


class StepInput(ctypes.Structure):
    """One engine step; the arrays must stay for as long as it runs."""

    _fields_ = (
        ("tokens", c_void_p),
        ("sequences", c_void_p),
        ("sampled", c_void_p),
        ("pool", c_void_p),
        ("logits", c_void_p),
        ("token_count", c_int32),
        ("sequence_count", c_int32),
        ("sampled_count", c_int32),
    )


_FUNCTIONS = {
    "baton_width": (c_int, ()),
    "baton_amx": (c_int, ()),
    "baton_sizes": (None, (c_void_p,)),
    "baton_packed_bytes": (c_int64, (c_int64, c_int64, c_int)),
    "baton_pack": (c_int, (POINTER(Matrix), c_int64, POINTER(Source), c_int)),
    "baton_program_new": (c_void_p, (POINTER(Plan), c_int)),
    "baton_program_delete": (None, (c_void_p,)),
    "baton_program_run": (c_int, (c_void_p, POINTER(StepInput), c_int, c_int)),
}
_INSTRUCTIONS = {16: "avx512", 8: "avx2", 4: "128-bit vectors"}


class Library:
    """The functions of step.cpp; calls release the GIL."""

    def __init__(self, path: str) -> None:
        """Load it; raises NoNativeCode if that fails or if it is not of this version."""
        try:
            self._library = ctypes.CDLL(path)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            raise NoNativeCode(f"{path} does not load: {error}") from None
        mirrored = [ctypes.sizeof(s) for s in (Op, Plan, StepInput, SequenceRows, Source, Routing)]
        sizes = (c_int64 * len(mirrored))()
        self._library.baton_sizes(sizes)
        if list(sizes) != mirrored:
            raise NoNativeCode(f"{path} has structures of {list(sizes)} bytes, not {mirrored}")

    @property
    def instructions(self) -> str:
        """Return which vector instructions it is made of."""
        return _INSTRUCTIONS[self._library.baton_width()]

    @property
    def amx(self) -> bool:
        """Return whether products in bfloat16 use the tiles of AMX; the bits are the same."""
        return bool(self._library.baton_amx())

    def packed_bytes(self, inputs: int, outputs: int, form: Format) -> int:
        """Return the size of a packed matrix."""
        return int(self._library.baton_packed_bytes(inputs, outputs, form))

    def pack(self, matrix: Matrix, first: int, source: Source, threads: int) -> None:
        """Copy rows into a matrix, as its outputs from `first` on."""
        if self._library.baton_pack(ctypes.byref(matrix), first, ctypes.byref(source), threads):
            raise MemoryError("no threads to pack weights with")

    def new_program(self, plan: Plan, threads: int) -> int:
        """Return a handle; whoever has it deletes it."""
        handle = self._library.baton_program_new(ctypes.byref(plan), threads)
        if not handle:
            raise MemoryError(f"no memory or no threads for a program on {threads} threads")
        return int(handle)

    def delete_program(self, handle: int) -> None:
        """End its threads and free its buffers."""
        self._library.baton_program_delete(handle)

    def run(self, handle: int, step: StepInput, first: int, last: int) -> int:
        """Compute operations [first, last) of a step; return 0, or what was wrong."""
        return int(self._library.baton_program_run(handle, ctypes.byref(step), first, last))


@functools.cache
def load_library() -> Library:
    """Return the library, compiled first if need be; raises NoNativeCode if it cannot be had."""
    return Library(str(build()))
