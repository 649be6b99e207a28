"""Hugging Face transformers on the same weights: continuous batching, and a static cache.

Only decode is compared. Continuous batching says when each token came: what counts is the time in
which all requests decode. With a static cache everything is generated for n and for 3n tokens, and
the difference counts: prompts, set-up and what is compiled at first use cancel out. Compiling takes
most of the stage's time, so that comes last.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench.gpu.clock import synchronize
from bench.gpu.drawn import config_of, draw
from bench.gpu.hf_model import hf_model
from bench.gpu.stage_run import StageRun


def run(stage: StageRun) -> None:
    """Measure one model in each way, at every size."""
    scale = stage.scale
    names = [
        *(f"continuous batching, {r} at {c}" for r, c in scale.peer_continuous),
        *(f"static cache, {b} at {c}" for b, c in scale.peer_static),
    ]
    if stage.known(*names):
        return
    config = config_of(scale.shape)
    weights = draw(config, stage.device, stage.dtype)
    model = hf_model(config, weights, stage.dtype, stage.device)
    for requests, context in scale.peer_continuous:
        stage.case(
            f"continuous batching, {requests} at {context}",
            partial(_continuous, stage, model, requests, context),
        )
    model.set_attn_implementation("sdpa")
    for batch, context in scale.peer_static:
        stage.case(
            f"static cache, {batch} at {context}",
            partial(_static, stage, model, batch, context),
        )


def decode_rate(times: Sequence[Sequence[float]]) -> float:
    """Return tokens a second while all requests decode, from the times of each one's tokens.

    Raises ValueError if the first was done before the last began.
    """
    begin, end = max(t[0] for t in times), min(t[-1] for t in times)
    if begin >= end:
        raise ValueError("there was no time in which all requests decoded")
    return sum(begin < moment <= end for t in times for moment in t) / (end - begin)


def _continuous(stage: StageRun, model: Any, requests: int, context: int) -> dict[str, Any]:
    """Sharing of prefixes is off; how much memory to take and what to capture is left to it."""
    from transformers import ContinuousBatchingConfig

    scale, tokens = stage.scale, 3 * stage.scale.peer_tokens
    small: dict[str, Any] = (
        {"num_blocks": 16, "max_batch_tokens": 64} if scale.device == "cpu" else {}
    )
    found = model.generate_batch(
        inputs=_prompts(stage, requests, context).tolist(),
        generation_config=_greedy(tokens),
        continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False, **small),
        record_timestamps=True,
        progress_bar=False,
    )
    lengths = [len(output.generated_tokens) for output in found.values()]
    assert lengths == [tokens] * requests, f"outputs of {lengths} tokens"
    rate = decode_rate([output.timestamps for output in found.values()])
    return _figures(requests, context, requests / rate)


def _static(stage: StageRun, model: Any, batch: int, context: int) -> dict[str, Any]:
    """One cache length for all runs, or decode would be compiled for each."""
    few = stage.scale.peer_tokens
    prompts = _prompts(stage, batch, context).to(stage.device)
    mask = torch.ones_like(prompts)

    def seconds(tokens: int) -> float:
        synchronize(stage.device)
        began = time.perf_counter()
        config = _greedy(tokens, cache_implementation="static", max_cache_len=context + 3 * few + 1)
        with torch.inference_mode():
            out = model.generate(prompts, attention_mask=mask, generation_config=config)
        synchronize(stage.device)
        assert out.shape[1] == context + tokens, f"{out.shape[1] - context} tokens"
        return time.perf_counter() - began

    compiling = seconds(few)
    step = (seconds(3 * few) - seconds(few)) / (2 * few)
    return _figures(batch, context, step) | {"first_s": compiling}


def _figures(batch: int, context: int, step: float) -> dict[str, Any]:
    return {"batch": batch, "context": context, "step_s": step, "tokens_s": batch / step}


def _prompts(stage: StageRun, count: int, tokens: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(1, stage.scale.shape.vocabulary, (count, tokens), generator=random)


def _greedy(tokens: int, **more: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
