"""The native pass: the same bits for a token in any batch, chunk and number of threads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.kernels.native.build import FLAGS, NoNativeCode, build
from baton.kernels.native.library import Library, load_library
from baton.models import loader
from baton.models.loader import load_model
from baton.models.native_weights import NATIVE_DTYPES

WITHOUT_AMX = (*FLAGS, "-U__AMX_TILE__")
AVX2 = tuple("-march=haswell" if flag == "-march=native" else flag for flag in FLAGS)
LENGTHS = (70, 1, 33, 90, 5)

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {"head_dim": 40, "sliding_window": 20, "attn_logit_softcapping": 5.0},
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 48,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "q_lora_rank": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
    },
}


@pytest.fixture(scope="module", autouse=True)
def library() -> Library:
    try:
        return load_library()
    except NoNativeCode as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(1, 1000, (length,), generator=random).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=["llama", *FAMILIES])
def folder(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_model: Callable[..., Path],
) -> Path:
    config = FAMILIES.get(request.param, {})
    return write_model(tmp_path_factory.mktemp("native") / "model", request.param, **config)


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_the_same_bits_in_any_batch(
    folder: Path, texts: list[list[int]], make_driver: Any, dtype: str
) -> None:
    model = load_model(folder, executor="native", dtype=dtype)
    alone = [make_driver(model).logits([text], chunk=1000)[0] for text in texts]
    for block_size, chunk in ((16, 1000), (8, 7), (32, 1)):
        together = make_driver(model, block_size=block_size).logits(texts, chunk=chunk)
        for found, expected in zip(together, alone, strict=True):
            assert torch.equal(found, expected), f"blocks of {block_size}, chunks of {chunk}"


@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_the_same_bits_on_any_number_of_threads(
    folder: Path, texts: list[list[int]], make_driver: Any, dtype: str
) -> None:
    one, three = (load_model(folder, executor="native", threads=n, dtype=dtype) for n in (1, 3))
    for found, expected in zip(
        make_driver(three).logits(texts, chunk=40),
        make_driver(one).logits(texts, chunk=40),
        strict=True,
    ):
        assert torch.equal(found, expected)


def test_the_same_bits_with_tiles_and_with_vectors(
    folder: Path, texts: list[list[int]], make_driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, whether this processor has AMX or not."""
    expected = make_driver(load_model(folder, executor="native", dtype="bfloat16"))
    monkeypatch.setattr(loader, "load_library", lambda: Library(str(build(WITHOUT_AMX))))
    model = load_model(folder, executor="native", dtype="bfloat16")
    assert "AMX" not in model.executor
    for found, wanted in zip(
        make_driver(model).logits(texts, chunk=40), expected.logits(texts, chunk=40), strict=True
    ):
        assert torch.equal(found, wanted)


def test_bfloat16_is_nearer_to_float32_than_in_transformers(
    folder: Path, texts: list[list[int]], make_driver: Any
) -> None:
    """Both round the same weights; the norms, sums and the stream that stay float32 here do not."""
    in_float32, in_bfloat16 = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16)
    )
    text = torch.tensor([texts[3]])
    with torch.inference_mode():
        exact, theirs = (model(text).logits[0].float() for model in (in_float32, in_bfloat16))
    model = load_model(folder, executor="native", dtype="bfloat16")
    (ours,) = make_driver(model).logits([texts[3]], chunk=40)
    assert 0 < (ours - exact).abs().mean() < (theirs - exact).abs().mean()


def test_avx2_computes_the_same(
    folder: Path, texts: list[list[int]], make_driver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To rounding: sums of squares and of softmax go by the width of a vector."""
    expected = make_driver(load_model(folder, executor="native")).logits(texts, chunk=40)
    monkeypatch.setattr(loader, "load_library", lambda: Library(str(build(AVX2))))
    model = load_model(folder, executor="native")
    assert "avx2" in model.executor
    for found, wanted in zip(make_driver(model).logits(texts, chunk=40), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_weights_in_bfloat16_take_half_the_memory(
    tmp_path: Path, write_llama: Callable[..., Path]
) -> None:
    sizes = []
    for dtype in ("float32", "bfloat16"):
        model = load_model(write_llama(tmp_path / dtype, dtype=dtype), executor="native")
        assert isinstance(model, loader.NativeDecoder)
        sizes.append(model.weights.nbytes)
    assert sizes[0] == 2 * sizes[1]
