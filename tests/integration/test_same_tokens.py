"""The tokens are those of transformers in float32: alone, batched, handed over and mixed."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

LENGTHS = (1, 15, 16, 17, 48, 100, 257)
NEW_TOKENS = 24

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
    def __init__(self, stream, encoding="utf-8"):
        self.stream = stream
'''


def prompts_for(model_dir: Path) -> list[tuple[int, ...]]:
    """Ragged prompts: the model's own kind of text if it has learnt one, else random tokens."""
    if (model_dir / "tokenizer.json").exists():
        ids = AutoTokenizer.from_pretrained(model_dir)(CODE * 3)["input_ids"]
    else:
        draw = random.Random(5)
        ids = [draw.randrange(1, 1000) for _ in range(400)]
    return [tuple(ids[i * 3 : i * 3 + length]) for i, length in enumerate(LENGTHS)]


@cache
def expected(model_dir: Path) -> list[list[int]]:
    """What transformers generates, one prompt at a time, greedily, in float32."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts_for(model_dir):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=None,
                pad_token_id=0,
            )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.fixture(params=["demo", "random"])
def model_dir(request: pytest.FixtureRequest, demo_model_dir: Path, random_llama_dir: Path) -> Path:
    return demo_model_dir if request.param == "demo" else random_llama_dir


@pytest.fixture(scope="module")
def random_llama_dir(tmp_path_factory: pytest.TempPathFactory, write_llama: Any) -> Path:
    folder: Path = write_llama(tmp_path_factory.mktemp("integration") / "llama")
    return folder


FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 24},
    "gemma2": {"head_dim": 40, "sliding_window": 20},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v2": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 48,
        "q_lora_rank": None,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "first_k_dense_replace": 1,
    },
}
"""Windows, softcaps, experts, and latent attention, whose KV has a layout of its own."""


@pytest.mark.parametrize("family", FAMILIES)
async def test_every_kind_of_kv_is_handed_over(
    start_pair: Any, tools: Any, write_model: Any, tmp_path: Path, family: str
) -> None:
    folder = write_model(tmp_path / family, family, **FAMILIES[family])
    pair = await start_pair(folder, prefill={"max_batch_tokens": 48})
    layout = pair.decode.instance.layout
    assert layout.parts == (1 if family == "deepseek_v2" else 2)
    prompts = [tools.prompt(p, NEW_TOKENS) for p in prompts_for(folder)]
    answers = await pair.session.run(prompts, [pair.ref])
    assert [a.tokens for a in answers] == expected(folder)
    for prompt, answer in zip(prompts, answers, strict=True):
        [trace] = answer.finish.handovers
        assert trace.outcome == "ok"
        assert trace.bytes == layout.blocks_for(len(prompt.tokens)) * layout.block_bytes
        assert not answer.finish.local_prefill


@pytest.mark.parametrize("chunk", [32, 512], ids=["small chunks", "one chunk"])
@pytest.mark.parametrize("min_read_kib", [0, 256], ids=["layer by layer", "large reads"])
async def test_handed_over(
    start_pair: Any, tools: Any, model_dir: Path, chunk: int, min_read_kib: int
) -> None:
    handover = {"min_read_kib": min_read_kib, "offer_cost_s": 0}
    pair = await start_pair(model_dir, prefill={"max_batch_tokens": chunk, "handover": handover})
    prompts = [tools.prompt(p, NEW_TOKENS) for p in prompts_for(model_dir)]
    answers = await pair.session.run(prompts, [pair.ref])
    assert [a.tokens for a in answers] == expected(model_dir)
    for prompt, answer in zip(prompts, answers, strict=True):
        [trace] = answer.finish.handovers
        assert trace.outcome == "ok"
        assert trace.transport == "shm"
        assert trace.blocks == -(-len(prompt.tokens) // 16)
        assert trace.bytes == trace.blocks * pair.decode.instance.layout.block_bytes
        assert not answer.finish.local_prefill
    assert pair.prefill.stats()["handover_ok"] == len(prompts)


async def test_alone_and_mixed(start_pair: Any, tools: Any, model_dir: Path) -> None:
    pair = await start_pair(model_dir)
    prompts = [tools.prompt(p, NEW_TOKENS) for p in prompts_for(model_dir)]
    together = await pair.session.run(prompts)
    assert [a.tokens for a in together] == expected(model_dir)
    assert all(a.finish.local_prefill for a in together)
    for prompt, tokens in zip(prompts, expected(model_dir), strict=True):
        [alone] = await pair.session.run([prompt], [pair.ref])
        assert alone.tokens == tokens


async def test_sampled_tokens_depend_on_nothing_but_the_request(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    pair = await start_pair(demo_model_dir, prefill={"max_batch_tokens": 48})
    prompts = [
        tools.prompt(p, NEW_TOKENS, temperature=1.0, top_k=50, top_p=0.95, seed=seed)
        for seed, p in enumerate(prompts_for(demo_model_dir))
    ]
    batched = [a.tokens for a in await pair.session.run(prompts, [pair.ref])]
    mixed = [a.tokens for a in await pair.session.run(prompts[::-1])][::-1]
    alone = [(await pair.session.run([p], [pair.ref]))[0].tokens for p in prompts]
    assert batched == mixed == alone
    greedy = expected(demo_model_dir)
    assert sum(a != b for a, b in zip(batched, greedy, strict=True)) >= len(greedy) - 1


async def test_stop_tokens_and_length(start_pair: Any, tools: Any, demo_model_dir: Path) -> None:
    pair = await start_pair(demo_model_dir)
    prompt, tokens = prompts_for(demo_model_dir)[-1], expected(demo_model_dir)[-1]
    for at in (0, 5):
        first = tokens.index(tokens[at])
        for prefill in ([pair.ref], []):
            [answer] = await pair.session.run(
                [tools.prompt(prompt, NEW_TOKENS, stop=(tokens[at],))], prefill
            )
            assert answer.reason == "stop"
            assert answer.tokens == tokens[: first + 1]
    for prefill in ([pair.ref], []):
        [one] = await pair.session.run([tools.prompt(prompt, 1)], prefill)
        assert (one.reason, one.tokens) == ("length", tokens[:1])


async def test_a_small_pool_preempts_and_still_gives_the_same_tokens(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    """Decode has room for about two of the longest requests: it must wait, preempt, recompute."""
    pair = await start_pair(demo_model_dir, decode={"kv_memory_mib": 3})
    kv_tokens = pair.decode.info.kv_tokens
    assert kv_tokens < sum(LENGTHS)
    new = 96
    prompts = [tools.prompt(p, new) for p in prompts_for(demo_model_dir)[1:]] * 2
    roomy = await start_pair(demo_model_dir)
    whole = [a.tokens for a in await roomy.session.run(prompts)]
    answers = await pair.session.run(prompts, [pair.ref])
    assert [a.tokens for a in answers] == whole
    assert pair.decode.stats()["preemptions"] > 0


async def test_preempted_to_host_memory_and_back_gives_the_same_tokens(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    small = {"kv_memory_mib": 3, "host_memory_mib": 16, "swap_block_cost": 0.5}
    pair = await start_pair(demo_model_dir, decode=small | {"prefix_cache": False})
    prompts = [
        tools.prompt(p, 96, temperature=0.7 * (i % 2), seed=i)
        for i, p in enumerate(prompts_for(demo_model_dir)[1:] * 2)
    ]
    roomy = await start_pair(demo_model_dir)
    whole = [a.tokens for a in await roomy.session.run(prompts)]
    answers = await pair.session.run(prompts, [pair.ref])
    assert [a.tokens for a in answers] == whole
    stats = pair.decode.stats()
    assert stats["blocks_swapped_out"] == stats["blocks_swapped_in"] > 0
    assert roomy.decode.stats()["preemptions"] == 0


@pytest.mark.parametrize("policy", ["priority", "sjf"])
async def test_every_policy_gives_the_same_tokens(
    start_pair: Any, tools: Any, demo_model_dir: Path, policy: str
) -> None:
    options = {"policy": policy, "max_sequences": 2}
    pair = await start_pair(demo_model_dir, prefill=options, decode=options)
    prompts = [
        tools.prompt(p, NEW_TOKENS, priority=5 - i)
        for i, p in enumerate(prompts_for(demo_model_dir))
    ]
    for prefill in ([pair.ref], []):
        answers = await pair.session.run(prompts, prefill)
        assert [a.tokens for a in answers] == expected(demo_model_dir)


async def test_one_message_a_step_carries_all_sequences(
    start_pair: Any, tools: Any, demo_model_dir: Path
) -> None:
    pair = await start_pair(demo_model_dir)
    before = pair.decode.stats()["steps"]
    prompts = [tools.prompt(p, NEW_TOKENS) for p in prompts_for(demo_model_dir)]
    answers = await pair.session.run(prompts)
    steps = pair.decode.stats()["steps"] - before
    assert sum(len(a.tokens) for a in answers) == len(prompts) * NEW_TOKENS
    assert len(pair.session.frames) <= steps
    assert max(len(f.updates) for f in pair.session.frames) == len(prompts)
