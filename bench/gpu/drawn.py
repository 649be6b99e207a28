"""Random weights, drawn on the device: no checkpoint is read, and no model hub is asked.

Every test and stage that draws with the same seed on the same kind of device has the same model.
Matrices are scaled so that neither activations nor logits collapse, norms are far from 1, so that
whoever leaves one out is found.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baton.models.weights import Checkpoint
from bench.gpu.floors import ModelShape

_GAIN = 1.6


def config_of(shape: ModelShape, layers: int | None = None, context: int = 16384) -> dict[str, Any]:
    """Return the config.json of a Llama of this shape, perhaps of fewer layers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers or shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": None,
    }


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json, by which Baton reads what the model is."""
    folder.joinpath("config.json").write_text(json.dumps(dict(config)))


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama by their names on disk."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    ends = (config["vocab_size"], hidden)
    found = {"model.embed_tokens.weight": ends, "model.norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    return found | {"lm_head.weight": ends}


def draw(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, seed: int = 0
) -> dict[str, Tensor]:
    """Return random weights by name; of one seed, device and version of torch always the same."""
    random = torch.Generator(device).manual_seed(seed)
    found = {}
    for name, shape in shapes_of(config).items():
        weight = torch.empty(shape, dtype=dtype, device=device)
        if len(shape) == 1:
            weight.uniform_(0.5, 1.5, generator=random)
        elif "embed_tokens" in name:
            weight.normal_(0, 0.2, generator=random)
        else:
            weight.normal_(0, _GAIN * shape[1] ** -0.5, generator=random)
        found[name] = weight
    return found


class DrawnCheckpoint(Checkpoint):
    """Drawn weights, where a checkpoint's files would be."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Tensors of which all is wanted are shared, not copied."""
        some = next(iter(weights.values()))
        self.dtype, self.device = some.dtype, some.device
        self._weights = weights
        self._model_dir = Path("drawn")
        self._files = dict.fromkeys(weights, (None, self._model_dir))
        self._taken = set()

    def _read(
        self,
        name: str,
        shape: tuple[int, ...],
        allowed: dict[str, torch.dtype],
        cut: tuple[slice, ...] = (),
    ) -> Tensor:
        weight = self._weights[name]
        assert weight.shape == shape, f"{name}: {tuple(weight.shape)} is not {shape}"
        self._taken.add(name)
        return weight[cut] if cut else weight
