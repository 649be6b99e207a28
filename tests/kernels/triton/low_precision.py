"""Gives Triton's interpreter the meaning of bfloat16 and float8 that GPUs have.

The interpreter of Triton 3.6 keeps such values as bits in numpy integers and computes with these
bits: `tl.dot` and comparisons are wrong without a word, casts truncate and do not saturate. Here
every operation on them goes by way of float32, and every cast by way of torch, which rounds to the
nearest even value.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_TORCH = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
_SMALL = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_SIGNED = {1: np.int8, 2: np.int16, 4: np.int32}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def to_float32(bits: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Return the float32 values of what the interpreter keeps for `dtype`."""
    of = _TORCH[dtype]
    signed = np.ascontiguousarray(bits).view(_SIGNED[of.itemsize])
    return torch.from_numpy(signed).view(of).to(torch.float32).numpy().reshape(bits.shape)


def from_float32(values: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """Return what the interpreter keeps for `dtype`, rounded, and saturated where it is float8."""
    wide = torch.from_numpy(np.array(values, dtype=np.float32))
    if dtype in _LARGEST:
        wide = wide.clamp(-_LARGEST[dtype], _LARGEST[dtype])
    narrow = wide.to(_TORCH[dtype])
    size = narrow.element_size()
    signed = {1: torch.int8, 2: torch.int16, 4: torch.int32}[size]
    kept = narrow.view(signed).numpy().reshape(np.shape(values))
    stored = np.float16 if dtype == tl.float16 else np.float32 if size == 4 else _UNSIGNED[size]
    return kept.view(stored)


def repair() -> None:
    """Replace the interpreter's operations; to be called once, before any kernel runs."""
    convert, dot = interpreter._convert_float, InterpreterBuilder.create_dot
    binary, unary = InterpreterBuilder.binary_op, InterpreterBuilder.unary_op
    cast = InterpreterBuilder.cast_impl

    def convert_(bits: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source in _TORCH and target in _TORCH:
            return from_float32(to_float32(bits, source), target)
        return convert(bits, source, target, rounding)

    def dot_(self: Any, a: Any, b: Any, sums: Any, *rest: Any) -> Any:
        kinds = a.dtype.scalar, b.dtype.scalar
        if not any(kind in _SMALL for kind in kinds):
            return dot(self, a, b, sums, *rest)
        left, right = (
            to_float32(x.data, kind) if kind in _TORCH else x.data
            for x, kind in zip((a, b), kinds, strict=True)
        )
        return TensorHandle(np.matmul(left, right) + sums.data, sums.dtype.scalar)

    def binary_(self: Any, left: Any, right: Any, op: Callable[..., Any]) -> Any:
        kind = left.dtype.scalar
        if kind not in _SMALL:
            return binary(self, left, right, op)
        found = op(to_float32(left.data, kind), to_float32(right.data, kind))
        kept = found if found.dtype == np.bool_ else from_float32(found, kind)
        return TensorHandle(kept, kind)

    def unary_(self: Any, x: Any, op: Callable[..., Any]) -> Any:
        kind = x.dtype.scalar
        if kind not in _SMALL:
            return unary(self, x, op)
        return TensorHandle(from_float32(op(to_float32(x.data, kind)), kind), kind)

    def cast_(self: Any, x: Any, target: Any) -> Any:
        source, kind = x.dtype.scalar, target.scalar
        if source in _SMALL and kind not in _TORCH:
            x = TensorHandle(to_float32(x.data, source), tl.float32)
        elif kind in _SMALL and source not in _TORCH:
            return TensorHandle(from_float32(x.data.astype(np.float32), kind), kind)
        return cast(self, x, target)

    interpreter._convert_float = convert_
    InterpreterBuilder.create_dot = dot_
    InterpreterBuilder.binary_op = binary_
    InterpreterBuilder.unary_op = unary_
    InterpreterBuilder.cast_impl = cast_
