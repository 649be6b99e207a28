"""The runner gives, token for token, what transformers gives in float32, however it is driven."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import LayerWatch, ScheduledSequence, StepPlan
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.runner import ModelRunner
from baton.models.loader import Model, load_model

SEEDED = SamplingParams(temperature=0.9, top_k=50, top_p=0.95, seed=11)


def test_the_reference_says_something(reference: Any) -> None:
    """Outputs that loop would hide mistakes."""
    assert sum(len(set(output)) for output in reference.outputs) > 6 * 10


@pytest.mark.parametrize(("block_size", "chunk"), [(8, 1000), (16, 32), (16, 1), (32, 7)])
def test_logits_of_a_ragged_batch(
    model: Model, reference: Any, make_driver: Any, block_size: int, chunk: int
) -> None:
    texts = [p + o for p, o in zip(reference.prompts, reference.outputs, strict=True)]
    for text, found in zip(
        texts, make_driver(model, block_size=block_size).logits(texts, chunk=chunk), strict=True
    ):
        expected = reference.logits(text)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            found.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=2e-4
        )


@pytest.mark.parametrize(("block_size", "chunk"), [(8, 5), (16, 1000), (32, 16)])
def test_greedy_tokens_of_a_ragged_batch(
    model: Model, reference: Any, make_driver: Any, block_size: int, chunk: int
) -> None:
    driver = make_driver(model, block_size=block_size)
    assert driver.generate(reference.prompts, chunk=chunk) == reference.outputs


def test_greedy_tokens_alone(model: Model, reference: Any, make_driver: Any) -> None:
    driver = make_driver(model)
    for prompt, output in zip(reference.prompts, reference.outputs, strict=True):
        assert driver.generate([prompt], chunk=24) == [output]


def test_greedy_tokens_when_prompts_come_while_others_decode(
    model: Model, reference: Any, make_driver: Any
) -> None:
    driver = make_driver(model)
    assert driver.generate(reference.prompts, chunk=8, arrive_every=9) == reference.outputs


def test_seeded_tokens_do_not_depend_on_the_batch(
    model: Model, reference: Any, make_driver: Any
) -> None:
    together = make_driver(model).generate(reference.prompts, sampling=SEEDED)
    other = make_driver(model, block_size=8)
    alone = [other.generate([p], chunk=10, sampling=SEEDED)[0] for p in reference.prompts]
    assert together == alone
    assert together != reference.outputs


def test_greedy_and_seeded_rows_share_a_step(
    model: Model, reference: Any, make_driver: Any
) -> None:
    driver = make_driver(model)
    seeded = make_driver(model).generate(reference.prompts[:1], sampling=SEEDED, output=1)
    plan = [
        ScheduledSequence(SeqId(i), tuple(p), 0, driver.add(p, 1, s).blocks, True, s)
        for i, (p, s) in enumerate(
            [(reference.prompts[0], SEEDED), (reference.prompts[4], SamplingParams(temperature=0))]
        )
    ]
    tokens = driver.runner.execute(StepPlan(0, tuple(plan))).tokens
    assert tokens == {0: seeded[0][0], 1: reference.outputs[4][0]}


def test_garbage_in_blocks_never_comes_through(
    model: Model, reference: Any, make_driver: Any
) -> None:
    """Freed blocks, and blocks whose transfer failed, may hold anything, even NaN."""
    driver = make_driver(model)
    driver.kv.tensor.fill_(float("nan"))
    assert driver.generate(reference.prompts, chunk=10) == reference.outputs


def test_only_own_blocks_are_written(model: Model, reference: Any, make_driver: Any) -> None:
    driver = make_driver(model)
    driver.kv.tensor.fill_(3.0)
    sequence = driver.add(reference.prompts[3], 0, SEEDED)
    part = ScheduledSequence(SeqId(0), tuple(sequence.tokens), 0, sequence.blocks, False, SEEDED)
    assert driver.runner.execute(StepPlan(5, (part,))).tokens == {}
    untouched = (driver.kv.tensor == 3.0).flatten(1).all(1)
    assert set(untouched.logical_not().nonzero().flatten().tolist()) == set(sequence.blocks)


def test_who_watches_finds_the_layers_written(
    model: Model, reference: Any, make_driver: Any
) -> None:
    """When it is told of layers, their KV is what it is at the end of the step."""
    driver = make_driver(model)
    sequence = driver.add(reference.prompts[4], 0, SEEDED)
    part = ScheduledSequence(SeqId(0), tuple(sequence.tokens), 0, sequence.blocks, True, SEEDED)
    blocks = list(sequence.blocks)
    seen: dict[int, torch.Tensor] = {}

    def look(layers: int) -> None:
        seen[layers] = driver.kv.tensor[blocks].clone()

    ends = tuple(range(1, model.spec.layers))
    driver.runner.execute(StepPlan(0, (part,)), LayerWatch(ends, look))
    assert tuple(seen) == ends
    for layers, early in seen.items():
        assert torch.equal(early[:, :layers], driver.kv.tensor[blocks][:, :layers])
        assert not early[:, layers:].any()


def test_kv_of_one_pool_serves_another(model: Model, reference: Any, make_driver: Any) -> None:
    """What a handover relies on: a prompt's blocks, copied elsewhere, decode to the same tokens."""
    source, target = make_driver(model), make_driver(model, num_blocks=40)
    prompt, output = reference.prompts[4], reference.outputs[4]
    first = source.add(prompt, 0, SamplingParams(temperature=0))
    part = ScheduledSequence(SeqId(0), tuple(prompt), 0, first.blocks, True, first.sampling)
    token = source.runner.execute(StepPlan(0, (part,))).tokens[SeqId(0)]
    second = target.add(prompt, len(output), first.sampling)
    for mine, theirs in zip(second.blocks, first.blocks, strict=False):
        target.kv.tensor[mine] = source.kv.tensor[theirs]
    tokens = [token]
    for position in range(len(prompt), len(prompt) + len(output) - 1):
        part = ScheduledSequence(
            SeqId(0), (tokens[-1],), position, second.blocks, True, first.sampling
        )
        tokens.append(target.runner.execute(StepPlan(0, (part,))).tokens[SeqId(0)])
    assert tokens == output


def test_decodes_of_very_different_lengths(model: Model, reference: Any, make_driver: Any) -> None:
    """Long and short sequences are computed in groups, and each gets its own result back."""
    long = (reference.prompts[4] + reference.outputs[4]) * 3
    prompts = [long, *reference.prompts, long[:250], long[:3]]
    expected = [reference.generate(p) for p in (long, long[:250], long[:3])]
    found = make_driver(model, num_blocks=200).generate(prompts, chunk=100)
    assert [found[0], found[-2], found[-1]] == expected
    assert found[1:-2] == reference.outputs


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.3},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 1, "head_dim": 48},
    ],
    ids=["linear", "llama3", "biases", "no GQA", "MQA, wide heads"],
)
def test_variants_of_the_architecture(
    config: dict[str, Any],
    tmp_path: Path,
    write_llama: Callable[..., Path],
    make_driver: Any,
    make_reference: Any,
) -> None:
    folder = write_llama(tmp_path / "llama", num_hidden_layers=2, **config)
    reference, model = make_reference(folder), load_model(folder)
    assert make_driver(model).generate(reference.prompts, chunk=20) == reference.outputs
    text = reference.prompts[4] + reference.outputs[4]
    found = make_driver(model).logits([text], chunk=30)[0]
    torch.testing.assert_close(found, reference.logits(text), rtol=0, atol=1e-4)


def test_a_config_in_its_published_form(
    tmp_path: Path, write_llama: Callable[..., Path], make_driver: Any, make_reference: Any
) -> None:
    folder = write_llama(
        tmp_path / "llama", num_hidden_layers=2, rope_theta=5000.0, rope_scaling=None
    )
    reference = make_reference(folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    config["torch_dtype"] = config.pop("dtype")
    assert config["rope_theta"] == 5000.0
    (folder / "config.json").write_text(json.dumps(config))
    outputs = make_driver(load_model(folder)).generate(reference.prompts)
    assert outputs == reference.outputs


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_computes_in_half_precision(
    tiny_llama_dir: Path, make_driver: Any, make_reference: Any, dtype: str
) -> None:
    reference, model = make_reference(tiny_llama_dir), load_model(tiny_llama_dir, dtype=dtype)
    driver = make_driver(model)
    assert driver.kv.tensor.dtype == getattr(torch, dtype)
    text = reference.prompts[4]
    found, expected = driver.logits([text], chunk=40)[0], reference.logits(text)
    off = (found - expected).abs().mean() / expected.abs().mean()
    assert 1e-4 < off < 0.05


def test_logits_that_are_not_finite_cost_their_own_sequence_alone(
    tiny_llama_dir: Path, make_driver: Any
) -> None:
    driver = make_driver(load_model(tiny_llama_dir))
    driver.kv.tensor[:2] = float("inf")

    def part(seq_id: int, *blocks: int) -> ScheduledSequence:
        table = tuple(BlockId(block) for block in blocks)
        return ScheduledSequence(SeqId(seq_id), (1,), 20, table, True, SEEDED)

    alone = driver.runner.execute(StepPlan(0, (part(1, 2, 3),)))
    both = driver.runner.execute(StepPlan(1, (part(0, 0, 1), part(1, 2, 3))))
    assert both.unsound == (0,)
    assert both.tokens == alone.tokens


def test_the_thread_count_holds_in_the_thread_that_runs(
    tiny_llama_dir: Path, make_driver: Any
) -> None:
    driver = make_driver(load_model(tiny_llama_dir, threads=1))
    seen: list[int] = []

    def work() -> None:
        torch.set_num_threads(2)
        driver.generate([[1, 2, 3]], output=1)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [1]


def test_counts_what_it_does(tiny_llama_dir: Path, make_driver: Any) -> None:
    driver = make_driver(load_model(tiny_llama_dir))
    driver.generate([[1, 2, 3, 4, 5], [6]], chunk=2, output=4)
    stats = driver.runner.stats()
    assert (stats.steps, stats.tokens, stats.sampled) == (6, 5 + 1 + 3 + 3, 8)
    assert stats.busy_s > 0
    assert "6 steps" in repr(driver.runner)


def test_refuses_a_pool_of_another_layout(tiny_llama_dir: Path) -> None:
    model = load_model(tiny_llama_dir)
    layout = make_layout(model.spec, 16, "bfloat16")
    with pytest.raises(AssertionError, match="bfloat16"):
        ModelRunner(model, KVCache(layout, 2))
