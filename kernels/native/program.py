"""A program of native operations on one KV pool."""

import ctypes
import weakref
from collections.abc import Sequence

from baton.core.errors import InternalError
from baton.core.kv_layout import KVLayout
from baton.kernels.native.library import Library, Op, Plan, PoolShape, Rotation, StepInput

_WRONG = {
    1: "no memory for the step's buffers",
    2: "a token that is not in the vocabulary",
    3: "a block that is not in the pool",
}


class Program:
    """Buffers, threads and operations; one step at a time, on one thread at a time."""

    def __init__(
        self,
        library: Library,
        operations: "ctypes.Array[Op]",
        *,
        widths: Sequence[int],
        spreads: Sequence[int],
        rotations: "ctypes.Array[Rotation]",
        vocabulary: int,
        pool: tuple[KVLayout, int],
        threads: int,
    ) -> None:
        """`widths` are the buffers' floats per row and `spreads` their rows per token; `pool` is of
        float32 or bfloat16, which is also what attention computes in, with its number of blocks.

        What the operations point to must stay for as long as the program.
        """
        layout, blocks = pool
        assert layout.dtype in ("float32", "bfloat16"), layout
        layer_stride = layout.runs_per_layer * layout.block_size * layout.head_dim
        plan = Plan(
            ops=operations,
            op_count=len(operations),
            widths=(ctypes.c_int32 * len(widths))(*widths),
            spreads=(ctypes.c_int32 * len(spreads))(*spreads),
            buffer_count=len(widths),
            rotations=rotations,
            rotation_count=len(rotations),
            vocabulary=vocabulary,
            blocks=blocks,
            pool=PoolShape(
                layout.layers * layer_stride,
                layout.parts,
                layout.kv_heads,
                layout.block_size,
                layout.head_dim,
            ),
            layer_stride=layer_stride,
            pairs=layout.dtype == "bfloat16",
        )
        self._library = library
        self._count = len(operations)
        self._handle = library.new_program(plan, threads)
        weakref.finalize(self, library.delete_program, self._handle)

    def __repr__(self) -> str:
        return f"<Program of {self._count} operations>"

    def run(self, step: StepInput, first: int = 0, last: int | None = None) -> None:
        """Compute operations [first, last) of a step, by default all; blocks, without the GIL.

        A step's operations run in order; its first call has `first` = 0. Raises InternalError for
        tokens or blocks that do not exist, before anything is computed.
        """
        wrong = self._library.run(self._handle, step, first, self._count if last is None else last)
        if wrong:
            raise InternalError(f"native step: {_WRONG[wrong]}")
