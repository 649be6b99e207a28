"""Compiles the kernels of a model for a Hopper GPU that need not be there; prints what came of it.

python -m tests.executor.compile_ahead MODEL_DIR
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.runtime.jit import JITFunction

from baton.core.config import EngineConfig
from baton.executor.gpu_compile import Wanted, compile_ahead, take_steps
from baton.executor.kv_cache import make_layout
from baton.kernels.backend import Backend, use_backend
from baton.models.share import Share
from baton.models.spec import read_spec
from tests.kernels.triton.ahead_of_time import _Hopper

CONFIG = EngineConfig(
    dtype="bfloat16",
    block_size=16,
    max_sequences=2,
    max_batch_tokens=16,
    cuda_graph_sizes=(2,),
    cuda_graph_tokens=(16,),
)


def compiled_twice(model_dir: Path) -> dict[str, Any]:
    """Return what was said, which kernels were compiled ahead, and which were missed by that."""
    use_backend(Backend.TRITON)
    triton.runtime.driver.set_active(_Hopper())
    compiled: list[str] = []

    def hook(*, fn: Any, **_: Any) -> None:
        compiled.append(fn.name.rsplit(".", 1)[-1])

    triton.knobs.runtime.jit_post_compile_hook = hook
    spec, said = read_spec(model_dir), list[str]()
    layout = make_layout(spec, CONFIG.block_size, CONFIG.dtype)
    wanted = Wanted(model_dir, spec, CONFIG, Share(), layout, 2)
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        compile_ahead(wanted, said.append)
        ahead, launch = list(compiled), JITFunction.run

        def only_compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            launch(kernel, *args, grid=grid, warmup=True, **options)

        JITFunction.run = only_compile
        take_steps(wanted)
    return {"said": said, "ahead": ahead, "missed": compiled[len(ahead) :]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compiled_twice(Path(sys.argv[1]))))
