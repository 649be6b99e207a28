"""The native operations, compiled for the tests, and called with tensors."""

import ctypes
import subprocess
from collections.abc import Sequence
from ctypes import c_bool, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.kernels.native.build import FLAGS, SOURCES, NoNativeCode, find_compiler

TARGETS = {
    "native": ["-march=native"],
    "avx2": ["-mavx2", "-mfma"],
    "plain": [],
}


def _record(**fields: Any) -> type[ctypes.Structure]:
    """Return a C struct with these fields, in order."""
    return type("Record", (ctypes.Structure,), {"_fields_": list(fields.items())})


_SEQUENCE = _record(row=c_int32, rows=c_int32, length=c_int32, blocks=c_void_p)
_SHAPE = _record(
    block_stride=c_int64, parts=c_int32, kv_heads=c_int32, block_size=c_int32, head_dim=c_int32
)
_GATHER = _record(
    table=c_void_p,
    table_stride=c_int64,
    index=c_void_p,
    scale=c_float,
    out=c_void_p,
    out_stride=c_int64,
    rows=c_int64,
    width=c_int64,
)
_RECORDS = {
    "attend": _record(
        sequences=c_void_p,
        count=c_int32,
        heads=c_int32,
        value_dim=c_int32,
        window=c_int32,
        scale=c_float,
        softcap=c_float,
        sinks=c_void_p,
        q=c_void_p,
        q_stride=c_int64,
        pool=c_void_p,
        shape=_SHAPE,
        pairs=c_bool,
        out=c_void_p,
        out_stride=c_int64,
        scratch=c_void_p,
        partials=c_void_p,
        counters=c_void_p,
    ),
    "rms_norm": _record(
        x=c_void_p,
        x_stride=c_int64,
        weight=c_void_p,
        eps=c_float,
        out=c_void_p,
        out_stride=c_int64,
        rows=c_int64,
        width=c_int64,
    ),
    "rope_table": _record(
        positions=c_void_p,
        frequencies=c_void_p,
        magnitude=c_float,
        cos=c_void_p,
        sin=c_void_p,
        tokens=c_int64,
        pairs=c_int64,
    ),
    "place_tokens": _record(
        sequences=c_void_p, count=c_int32, shape=_SHAPE, slots=c_void_p, positions=c_void_p
    ),
    "prepare_heads": _record(
        heads=c_void_p,
        stride=c_int64,
        tokens=c_int64,
        q_heads=c_int64,
        norm_weights=c_void_p,
        eps=c_float,
        cos=c_void_p,
        sin=c_void_p,
        pairs=c_int64,
        pool=c_void_p,
        narrow=c_bool,
        shape=_SHAPE,
        slots=c_void_p,
    ),
    "gate_mul": _record(
        gate_up=c_void_p,
        gate_up_stride=c_int64,
        out=c_void_p,
        out_stride=c_int64,
        rows=c_int64,
        width=c_int64,
        gate=c_int32,
        alpha=c_float,
        limit=c_float,
    ),
    "add": _record(x=c_void_p, y=c_void_p, count=c_int64),
    "softcap": _record(x=c_void_p, cap=c_float, count=c_int64),
    "gather_floats": _GATHER,
    "gather_bf16": _GATHER,
    "route": _record(
        logits=c_void_p,
        logits_stride=c_int64,
        tokens=c_int64,
        experts=c_int32,
        top_k=c_int32,
        scoring=c_int32,
        normalise=c_bool,
        scale=c_float,
        groups=c_int32,
        top_groups=c_int32,
        correction=c_void_p,
        chosen=c_void_p,
        weights=c_void_p,
    ),
    "group_pairs": _record(
        chosen=c_void_p,
        tokens=c_int64,
        experts=c_int32,
        top_k=c_int32,
        starts=c_void_p,
        rows=c_void_p,
        places=c_void_p,
    ),
    "combine": _record(
        x=c_void_p,
        x_stride=c_int64,
        places=c_void_p,
        weights=c_void_p,
        top_k=c_int32,
        shared=c_void_p,
        shared_stride=c_int64,
        out=c_void_p,
        out_stride=c_int64,
        tokens=c_int64,
        width=c_int64,
    ),
}


class Operations:
    """Every operation by its name, for the kind of processor that it was compiled for."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.test_attention_scratch.restype = c_int64
        library.test_attention_partials.restype = c_int64

    def __call__(self, name: str, threads: int, **fields: Any) -> None:
        """Run an operation; fields are those of its struct, null where they are not given."""
        getattr(self._library, f"test_{name}")(ctypes.byref(_job(name, fields)), threads)

    def attend(self, threads: int, **fields: Any) -> None:
        """Run attention with memory of its own, which is NaN before."""
        dims = c_int64(fields["shape"].head_dim), c_int64(fields["value_dim"])
        pairs = c_bool(fields["pairs"])
        scratch = torch.empty(threads * self._library.test_attention_scratch(*dims, pairs))
        fields["scratch"] = scratch.fill_(float("nan"))
        count = self._library.test_attention_partials(ctypes.byref(_job("attend", fields)), threads)
        fields["partials"] = torch.full((count,), float("nan"))
        groups = fields["count"] * fields["shape"].kv_heads
        fields["counters"] = torch.zeros(groups, dtype=torch.int32)
        self("attend", threads, **fields)
        assert not fields["counters"].any()

    def exp_and_tanh(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return e^x, tanh x, and e^x by the function for x of at most 0."""
        found = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
        pointers = [c_void_p(tensor.data_ptr()) for tensor in (x, *found)]
        self._library.test_functions(*pointers, c_int64(len(x)))
        return found

    def narrowed(self, x: Tensor) -> Tensor:
        """Return x in bfloat16."""
        found = torch.zeros(len(x) + 1, dtype=torch.bfloat16)
        self._library.test_narrow(
            c_void_p(x.data_ptr()), c_int64(len(x)), c_void_p(found.data_ptr())
        )
        assert found[-1] == 0, "more was written than asked for"
        return found[:-1]

    @staticmethod
    def sequences(rows: Sequence[tuple[int, int]], tables: Sequence[Tensor]) -> ctypes.Array[Any]:
        """Return sequences of (new tokens, length) with their block tables (int32)."""
        records, start = [], 0
        for (count, length), table in zip(rows, tables, strict=True):
            records.append(_SEQUENCE(start, count, length, table.data_ptr()))
            start += count
        return (_SEQUENCE * len(records))(*records)

    @staticmethod
    def shape(pool: Tensor) -> ctypes.Structure:
        """Return the shape of a pool [blocks, layers, parts, kv_heads, block_size, head_dim]."""
        return _SHAPE(pool.stride(0), *pool.shape[2:])


def _job(name: str, fields: dict[str, Any]) -> ctypes.Structure:
    record = _RECORDS[name]
    known = {field[0] for field in record._fields_}
    assert fields.keys() <= known, f"{name}: no such fields: {fields.keys() - known}"
    return record(**{field: _value(value) for field, value in fields.items()})


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return ctypes.addressof(value) if isinstance(value, ctypes.Array) else value


@pytest.fixture(scope="session", params=TARGETS)
def operations(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Operations:
    """The operations, compiled for this processor, for AVX2, and for any of its kind."""
    if request.param == "avx2" and torch.backends.cpu.get_cpu_capability() not in (
        "AVX2",
        "AVX512",
    ):
        pytest.skip("no AVX2 here")
    try:
        compiler = find_compiler()
    except NoNativeCode as reason:
        pytest.skip(str(reason))
    library = tmp_path_factory.mktemp("native") / f"{request.param}.so"
    flags = [flag for flag in FLAGS if not flag.startswith("-march")] + TARGETS[request.param]
    source = Path(__file__).with_name("operations.cpp")
    command = [compiler, *flags, f"-I{SOURCES}", str(source), "-o", str(library)]
    subprocess.run(command, check=True, timeout=100)
    return Operations(ctypes.CDLL(str(library)))
