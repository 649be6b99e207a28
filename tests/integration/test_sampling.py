"""Every sampling option gives the same tokens handed over, mixed, alone, preempted and retried."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
)

from baton.core.request import SamplingParams, TokenLogprobs
from baton.proto import worker_pb2 as pb

CODE = '''
def read_config(path):
    """Read a configuration file and return a dictionary."""
    with open(path) as file:
        data = {}
        for line in file:
            name, _, value = line.partition("=")
            data[name.strip()] = value.strip()
    return data


class Reader:
    def __init__(self'''
NEW_TOKENS = 24
MIN_TOKENS = 20

Reference = Callable[..., tuple[list[int], torch.Tensor]]


def greedy_options(plain: list[int]) -> dict[str, dict[str, Any]]:
    """Options that must each change the `plain` greedy output; the last one needs `stop_of`."""
    return {
        "repetition": {"repetition_penalty": 1.6},
        "presence": {"presence_penalty": 2.0},
        "frequency": {"frequency_penalty": 2.0},
        "all penalties": {
            "repetition_penalty": 1.2,
            "presence_penalty": 1.0,
            "frequency_penalty": 1.0,
        },
        "bias": {"logit_bias": ((plain[0], -5.0), (plain[3], 4.0), (11, 3.0))},
        "bad words": {"bad_words": ((plain[9],), (plain[3], plain[4]))},
        "min tokens": {"min_tokens": MIN_TOKENS},
    }


def stop_of(plain: list[int], params: SamplingParams) -> tuple[int, ...]:
    """A token that would come before `min_tokens`; no stop token where those are not asked for."""
    return (plain[12],) if params.min_tokens else ()


DRAWN: tuple[dict[str, Any], ...] = (
    {"min_p": 0.05},
    {"typical_p": 0.8},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "top_k": 80},
    {
        "top_k": 200,
        "top_p": 0.97,
        "min_p": 0.001,
        "typical_p": 0.95,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "logit_bias": ((300, 1.0),),
        "bad_words": ((199,), (5, 6)),
        "min_tokens": 4,
    },
)


class OutputPenalties(LogitsProcessor):  # type: ignore[misc]
    """vLLM's presence and frequency penalties, which transformers lacks."""

    def __init__(self, params: SamplingParams, prompt_len: int) -> None:
        self._params = params
        self._prompt_len = prompt_len

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(ids[0, self._prompt_len :], minlength=scores.shape[1])
        scores = scores - self._params.frequency_penalty * counts
        return scores - self._params.presence_penalty * (counts > 0)


@pytest.fixture(scope="module")
def prompt(demo_model_dir: Path) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(demo_model_dir)(CODE)["input_ids"])


@pytest.fixture(scope="module")
def reference(demo_model_dir: Path, prompt: tuple[int, ...]) -> Reference:
    """Greedy tokens by transformers' own processors, and the raw log-softmax at each."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval()

    def generate(
        params: SamplingParams, stop: tuple[int, ...] = ()
    ) -> tuple[list[int], torch.Tensor]:
        ids = torch.tensor([prompt])
        options: dict[str, Any] = {}
        if params.bad_words:
            options["bad_words_ids"] = [list(word) for word in params.bad_words]
        if params.logit_bias:
            options["sequence_bias"] = {(token,): bias for token, bias in params.logit_bias}
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=params.min_tokens or None,
                eos_token_id=list(stop) or None,
                pad_token_id=0,
                repetition_penalty=params.repetition_penalty,
                logits_processor=LogitsProcessorList([OutputPenalties(params, len(prompt))]),
                output_logits=True,
                return_dict_in_generate=True,
                **options,
            )
        return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits).log_softmax(-1)

    return generate


def greedy(options: dict[str, Any]) -> SamplingParams:
    return SamplingParams(temperature=0.0, logprobs=3, **options)


@pytest.fixture(scope="module")
def plain(reference: Reference) -> list[int]:
    """The greedy output, if nothing is changed."""
    return reference(greedy({}))[0]


def all_params(plain: list[int]) -> list[SamplingParams]:
    drawn = [
        SamplingParams(temperature=1.1, seed=i, logprobs=i, **options)
        for i, options in enumerate(DRAWN)
    ]
    return [greedy(options) for options in greedy_options(plain).values()] + drawn


def assert_told(told: list[TokenLogprobs], tokens: list[int], expected: torch.Tensor) -> None:
    assert len(told) == len(tokens)
    for found, token, row in zip(told, tokens, expected, strict=True):
        assert found.logprob == pytest.approx(row[token].item(), abs=2e-4)
        values = [value for _, value in found.top]
        assert values == pytest.approx(row.topk(3).values.tolist(), abs=2e-4)
        assert values == pytest.approx([row[id_].item() for id_, _ in found.top], abs=2e-4)


async def test_greedy_tokens_and_logprobs_are_those_of_transformers(
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    prompt: tuple[int, ...],
    reference: Reference,
    plain: list[int],
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"max_batch_tokens": 32})
    cases = {"nothing": greedy({})} | {
        name: greedy(options) for name, options in greedy_options(plain).items()
    }
    prompts = [
        tools.prompt(prompt, NEW_TOKENS, stop=stop_of(plain, params), sampling=params)
        for params in cases.values()
    ]
    handed_over = await pair.session.run(prompts, [pair.ref])
    here = await pair.session.run(prompts)
    for (name, params), *answers in zip(cases.items(), handed_over, here, strict=True):
        stop = stop_of(plain, params)
        tokens, logprobs = reference(params, stop)
        without, _ = reference(greedy({}), stop)
        assert (tokens == without) == (name == "nothing"), f"{name} has no effect: a blind test"
        for answer in answers:
            assert answer.tokens == tokens, name
            assert_told(answer.logprobs, tokens, logprobs)
    assert all(a.finish.handovers[0].outcome == "ok" for a in handed_over)


async def test_tokens_and_logprobs_depend_on_nothing_but_the_request(
    start_pair: Any, tools: Any, demo_model_dir: Path, prompt: tuple[int, ...], plain: list[int]
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"max_batch_tokens": 48})
    prompts = [
        tools.prompt(prompt[: 40 + 3 * i], NEW_TOKENS, stop=stop_of(plain, params), sampling=params)
        for i, params in enumerate(all_params(plain))
    ]
    batched = await pair.session.run(prompts, [pair.ref])
    mixed = (await pair.session.run(prompts[::-1]))[::-1]
    alone = [(await pair.session.run([p], [pair.ref]))[0] for p in prompts]
    gone = pb.InstanceRef(instance_id="gone", address="127.0.0.1:1", incarnation=1)
    retried = await pair.session.run(prompts, [gone, pair.ref])
    assert all(len(answer.finish.handovers) == 2 for answer in retried)
    for answers in (mixed, alone, retried):
        assert [a.tokens for a in answers] == [a.tokens for a in batched]
        for found, expected in zip(answers, batched, strict=True):
            assert [t.logprob for t in found.logprobs] == pytest.approx(
                [t.logprob for t in expected.logprobs], abs=2e-4
            )
    for p, answer in zip(prompts, batched, strict=True):
        assert len(answer.logprobs) == len(answer.tokens)
        assert all(len(told.top) == p.sampling.logprobs for told in answer.logprobs)


@pytest.mark.parametrize("policy", ["priority", "sjf"])
async def test_every_policy_samples_the_same(
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    prompt: tuple[int, ...],
    plain: list[int],
    policy: str,
) -> None:
    """Two at a time, the last to come first: whoever waits is told of its tokens when it begins."""
    prompts = [
        tools.prompt(prompt[: 40 + 3 * i], NEW_TOKENS, sampling=params, priority=5 - i)
        for i, params in enumerate(all_params(plain))
    ]
    roomy = await start_pair(demo_model_dir)
    expected = await roomy.session.run(prompts)
    options = {"policy": policy, "max_sequences": 2}
    pair = await start_pair(demo_model_dir, prefill=options, decode=options)
    for prefill in ([pair.ref], []):
        answers = await pair.session.run(prompts, prefill)
        assert [a.tokens for a in answers] == [a.tokens for a in expected]


SWAP = {"host_memory_mib": 16, "swap_block_cost": 0.5, "prefix_cache": False}


@pytest.mark.parametrize("options", [{}, SWAP], ids=["computed again", "from host memory"])
async def test_preempted_sequences_keep_their_penalties(
    start_pair: Any,
    tools: Any,
    demo_model_dir: Path,
    prompt: tuple[int, ...],
    plain: list[int],
    options: dict[str, Any],
) -> None:
    """Decode has room for about two of them: what was said is counted anew after each return."""
    new = 96
    prompts = [
        tools.prompt(prompt[i:], new, sampling=params) for i, params in enumerate(all_params(plain))
    ]
    roomy = await start_pair(demo_model_dir)
    expected = await roomy.session.run(prompts)
    small = await start_pair(demo_model_dir, decode={"kv_memory_mib": 3} | options)
    answers = await small.session.run(prompts, [small.ref])
    assert [a.tokens for a in answers] == [a.tokens for a in expected]
    assert [len(a.logprobs) for a in answers] == [len(a.tokens) for a in answers]
    assert small.decode.stats()["preemptions"] > 0
    assert (small.decode.stats()["blocks_swapped_in"] > 0) == bool(options)
