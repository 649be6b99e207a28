"""A Llama of transformers with given weights, on the device."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def hf_model(
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    attention: str = "sdpa",
) -> Any:
    """Return a LlamaForCausalLM that has copies of the weights, or the weights if of its dtype.

    Raises ModuleNotFoundError where there is no transformers.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    known = {k: v for k, v in config.items() if k not in ("architectures", "model_type")}
    # The skeleton is made without memory, but for what follows from the config alone.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            LlamaConfig(**known), dtype=dtype, attn_implementation=attention
        )
    kept = {name: weight.to(device, dtype) for name, weight in weights.items()}
    model.load_state_dict(kept, assign=True, strict=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    left = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.is_meta]
    assert not left, f"without memory: {left}"
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model.eval().requires_grad_(False)
