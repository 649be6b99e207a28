"""Which meshes a model can be spread over, and where its stages begin."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from baton.core.errors import InvalidConfig
from baton.models.mesh_plan import check_mesh, layer_parameters, plan_stages, usable_sizes
from baton.models.spec import ModelSpec, read_spec
from baton.parallel.mesh import Mesh

Make = Callable[..., ModelSpec]


@pytest.fixture
def make(tmp_path: Path, write_model: Callable[..., Path]) -> Make:
    def make(model_type: str, **config: object) -> ModelSpec:
        return read_spec(write_model(tmp_path / model_type, model_type, **config))

    return make


def test_a_dense_model_names_the_sizes_that_would_do(make: Make) -> None:
    spec = make("llama", hidden_size=96, num_attention_heads=12, num_key_value_heads=3)
    for good in (Mesh(tp=1), Mesh(pp=3)):
        check_mesh(spec, good)
    with pytest.raises(InvalidConfig, match=r"tp.*'?2'?.*one of 1 for 12 query heads, 3 KV heads"):
        check_mesh(spec, Mesh(tp=2))
    with pytest.raises(InvalidConfig, match=r"pp.*one of 1, 2, 3 for 3 layers"):
        check_mesh(spec, Mesh(pp=4))
    with pytest.raises(InvalidConfig, match=r"ep.*one of 1 for a model without any"):
        check_mesh(spec, Mesh(ep=2))


def test_kv_heads_may_be_fewer_than_ranks(make: Make) -> None:
    spec = make("llama", num_attention_heads=8, num_key_value_heads=2, intermediate_size=96)
    assert usable_sizes(spec, "tp") == (1, 2, 4, 8)
    with pytest.raises(InvalidConfig, match=r"tp.*one of 1, 2, 4, 8"):
        check_mesh(spec, Mesh(tp=3))


def test_widths_and_experts_count_too(make: Make) -> None:
    spec = make(
        "deepseek_v2",
        num_attention_heads=8,
        num_key_value_heads=8,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        q_lora_rank=None,
        intermediate_size=48,
        moe_intermediate_size=20,
        n_routed_experts=6,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    assert usable_sizes(spec, "tp") == (1, 2, 4)
    assert usable_sizes(spec, "ep") == (1, 2, 3, 6)
    with pytest.raises(InvalidConfig, match=r"tp.*1, 2, 4 for 8 query heads.* widths of 20 and 48"):
        check_mesh(spec, Mesh(tp=8))
    with pytest.raises(InvalidConfig, match=r"ep.*one of 1, 2, 3, 6 for 6 experts"):
        check_mesh(spec, Mesh(ep=4))


def test_stages_count_the_embedding_the_output_and_the_kv(make: Make) -> None:
    spec = make("llama", num_hidden_layers=8, vocab_size=1024, tie_word_embeddings=False)
    # A matrix of 1024 x 128 at either end weighs a layer and a little more.
    assert 1 < 1024 * 128 / layer_parameters(spec.decoder.layers[0], spec.hidden) < 1.5
    assert plan_stages(spec, 4, dtype="float32", kv_bytes=0) == (1, 4, 7)
    assert plan_stages(spec, 4, dtype="float32", kv_bytes=1 << 30) == (2, 4, 6)
    assert plan_stages(spec, 1, dtype="float32", kv_bytes=0) == ()


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("mixtral", {"num_local_experts": 4}),
        ("deepseek_v3", {"q_lora_rank": 24, "n_group": 1, "topk_group": 1, "n_routed_experts": 4}),
    ],
)
def test_parameters_are_counted_as_they_are(
    tmp_path: Path, write_model: Callable[..., Path], model_type: str, config: dict[str, int]
) -> None:
    sizes = {"num_key_value_heads": 4, "num_experts_per_tok": 2} | config
    folder = write_model(tmp_path / model_type, model_type, **sizes)
    spec = read_spec(folder)
    tensors = load_file(folder / "model.safetensors")
    for index, layer in enumerate(spec.decoder.layers):
        matrices = [
            tensor.numel()
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{index}.") and tensor.ndim > 1
        ]
        assert layer_parameters(layer, spec.hidden) == sum(matrices)
