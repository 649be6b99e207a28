"""The hash by which two instances know that they may exchange KV."""

import hashlib
import json

from baton.core.kv_layout import KVLayout


def compatibility_hash(
    *, model: str, revision: str, compute_dtype: str, rope: str, layout: KVLayout
) -> str:
    """Return 32 hex digits; equal on two sides if and only if their KV is of the same model.

    Block size, dtype and sharding are left out: they may differ, and each side tells its own.

    `revision` identifies the weights themselves (models/revision.py), not the folder they lie in;
    `rope` the rotary frequencies, which for some models depend on the longest sequence served.
    """
    facts = {
        "model": model,
        "revision": revision,
        "compute_dtype": compute_dtype,
        "rope": rope,
        "kv": [layout.layers, layout.parts, layout.kv_heads, layout.head_dim],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
