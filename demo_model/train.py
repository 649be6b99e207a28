"""Train the two demo models on the Python standard library, from nothing, on a CPU.

    python demo_model/train.py tokenizer     # byte-level BPE, once
    python demo_model/train.py main          # or draft; resumes from its checkpoint
    python demo_model/train.py export        # writes demo_model/main and demo_model/draft
    python demo_model/train.py evaluate      # held-out bits per byte; sample shows continuations

Every step is a pure function of the corpus, the seed and the step's number, so a run that was
stopped and resumed sees the batches that an unbroken run sees.
"""

import argparse
import hashlib
import json
import math
import os
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional

hub: Any = transformers  # its own hints do not pass mypy --strict
HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
ENDS = {"bos_token_id": END_OF_TEXT_ID, "eos_token_id": END_OF_TEXT_ID}
VOCABULARY = 4096
MAX_LENGTH = 4096
PART_TOKENS = 2100  # a step runs in parts of about so many tokens, whose logits fit the caches

# Tests, generated tables and build records teach little about writing Python.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "pydoc_data", "encodings"}
SKIPPED_FOLDERS |= {"test", "tests", "idle_test", "testmock"}
SKIPPED_PREFIXES = ("config-", "_sysconfigdata")
HELD_OUT_ONE_IN = 25

# A run of newlines, an indentation, a word, a number or a run of signs is never merged with its
# neighbour, so a prompt may end at any of their borders and still be split as in training.
WORD_PATTERN = r"\n+|(?<=\n) +| ?[\p{L}_]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}_]+|\s+(?!\S)|\s+"

# A chat becomes a Python file: what is asked stands in comments, what is answered is code. The
# two blank lines before an answer make a definition at the margin the likeliest continuation.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '\\n\\n' + message['content'] + '\\n\\n\\n' }}
{%- else -%}
{{ '# ' + message['content'].split('\\n') | join('\\n# ') + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '\\n\\n' }}
{%- endif -%}
"""

TASKS = ("tokenizer", "main", "draft", "export", "evaluate", "sample")
PROMPTS = (
    'def read_config(path):\n    """',
    "class Stack:\n    def __init__(self):\n",
    "# A function that reads a file.\n\n\n",
)


@dataclass(frozen=True)
class Plan:
    """How one model is built and trained."""

    shape: dict[str, int]
    """Sizes, under their names in `LlamaConfig`."""
    steps: int
    """Optimiser steps in all."""
    long_steps: int
    """How many of them, at the end, see sequences of `MAX_LENGTH` tokens."""
    matrix_rate: float
    """Peak learning rate of Muon, which trains the matrices."""
    vector_rate: float
    """Peak learning rate of AdamW, which trains the embedding and the norms."""
    tokens_per_step: int = 4096
    short_length: int = 512
    warm_up: int = 40
    final_rate: float = 0.02
    """Learning rate at the last step, as a share of the peak."""
    seed: int = 1
    bfloat16: bool = False
    """Whether matrix products run in bfloat16; weights and optimisers are float32 all the same."""


MAIN_SHAPE = {
    "hidden_size": 256, "intermediate_size": 576, "num_hidden_layers": 8,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
}  # fmt: skip
DRAFT_SHAPE = {
    "hidden_size": 96, "intermediate_size": 224, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
PLANS = {
    "main": Plan(
        MAIN_SHAPE, steps=1000, long_steps=80, matrix_rate=4e-3, vector_rate=3e-3, bfloat16=True
    ),
    "draft": Plan(DRAFT_SHAPE, steps=560, long_steps=20, matrix_rate=6e-3, vector_rate=6e-3),
}


def main() -> None:
    """Run the subcommand that the command line names."""
    parser = argparse.ArgumentParser(description="Train the demo models on the standard library.")
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--checkpoints", type=Path, default=HERE / ".checkpoints")
    parser.add_argument("--out", type=Path, default=HERE, help="where export writes its folders")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop-after", type=int, help="stop (resumable) after this many steps")
    parser.add_argument("--context", type=int, default=2048, help="most tokens evaluate shows")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.checkpoints.mkdir(parents=True, exist_ok=True)
    if options.task == "tokenizer":
        build_tokenizer(options.checkpoints)
    elif options.task in PLANS:
        train(options.task, options.checkpoints, options.stop_after)
    elif options.task == "export":
        for name in PLANS:
            export(name, options.checkpoints, options.out / name)
    elif options.task == "evaluate":
        print(json.dumps(evaluate(options.out, options.context), indent=2))
    else:
        print(*sample(options.out / "main", PROMPTS), sep="\n" + "-" * 72 + "\n")


# --- Corpus and tokenizer -------------------------------------------------------------------


def corpus(held_out: bool) -> list[str]:
    """Return the training or the held-out files of the installed standard library.

    Whole files are held out, chosen by a hash of their path; of identical files one is kept.
    """
    root = Path(sysconfig.get_path("stdlib"))
    chosen: dict[str, int] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        wanted = SKIPPED_FOLDERS.isdisjoint(relative.parts)
        wanted &= not relative.parts[0].startswith(SKIPPED_PREFIXES)
        if wanted and (text := path.read_text("utf-8")).strip():
            chosen.setdefault(text, path_hash(relative.as_posix()))
    files = sorted(chosen, key=chosen.__getitem__)
    return [text for text in files if (chosen[text] % HELD_OUT_ONE_IN == 0) == held_out]


def path_hash(name: str) -> int:
    """Hash a path to a number that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def build_tokenizer(checkpoints: Path) -> None:
    """Train the byte-level BPE on the training files and save it beside the checkpoints."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(held_out=False), trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    tokenizer.save(str(checkpoints / "tokenizer.json"))


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the token ids of each text."""
    return [item.ids for item in tokenizer.encode_batch(texts, add_special_tokens=False)]


def token_stream(checkpoints: Path) -> Tensor:
    """Return all training files as one row of ids, an end-of-text before, between and after."""
    tokenizer = Tokenizer.from_file(str(checkpoints / "tokenizer.json"))
    ids = [END_OF_TEXT_ID]
    for document in encode(tokenizer, corpus(held_out=False)):
        ids += [*document, END_OF_TEXT_ID]
    return torch.tensor(ids)


def batch(stream: Tensor, step: int, length: int, plan: Plan) -> Tensor:
    """Return the `[rows, length + 1]` ids of one step.

    An epoch cuts the stream at a random offset into pieces of `length` and visits them in a
    random order; both depend on the seed, the length and the epoch alone.
    """
    rows = plan.tokens_per_step // length
    pieces = (len(stream) - 1) // length - 1
    starts = []
    for index in range(step * rows, (step + 1) * rows):
        epoch, place = divmod(index, pieces)
        random = torch.Generator().manual_seed(plan.seed * 1_000_000 + length * 100 + epoch)
        offset = int(torch.randint(length, (), generator=random))
        piece = int(torch.randperm(pieces, generator=random)[place])
        starts.append(offset + piece * length)
    return torch.stack([stream[start : start + length + 1] for start in starts])


# --- Model and training ---------------------------------------------------------------------


def new_model(plan: Plan) -> Any:
    """Build an untrained model: each layer begins as the identity."""
    torch.manual_seed(plan.seed)
    config = hub.LlamaConfig(
        vocab_size=VOCABULARY,
        **plan.shape,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        **ENDS,
    )
    model = hub.LlamaForCausalLM(config)
    for name, weight in matrices(model):
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            nn.init.zeros_(weight)
        else:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model


def matrices(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the layers' weight matrices: all but the embedding and the norms."""
    layers = ((name, weight) for name, weight in model.named_parameters() if ".layers." in name)
    return [(name, weight) for name, weight in layers if weight.ndim == 2]


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon (Jordan, 2024) for the matrices and AdamW for the rest."""
    large = dict(matrices(model))
    rest = [weight for name, weight in model.named_parameters() if name not in large]
    return [
        torch.optim.Muon(large.values(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_share(step: int, plan: Plan) -> float:
    """Return the learning rate of a step as a share of the peak: linear warm-up, then cosine."""
    if step < plan.warm_up:
        return (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / (plan.steps - plan.warm_up)
    return plan.final_rate + (1 - plan.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def train(name: str, checkpoints: Path, stop_after: int | None) -> None:
    """Train one model to the end of its plan, or by `stop_after` steps, and save it."""
    plan = PLANS[name]
    model = new_model(plan)
    tools = optimizers(model)
    peaks = (plan.matrix_rate, plan.vector_rate)
    file = checkpoints / f"{name}.pt"
    first = restore(file, model, tools)
    last = plan.steps if stop_after is None else min(plan.steps, first + stop_after)
    stream = token_stream(checkpoints)
    print(f"{name}: {model.num_parameters()} parameters, {len(stream)} tokens, from step {first}")
    began, shown = time.monotonic(), 0.0
    for step in range(first, last):
        for tool, peak in zip(tools, peaks, strict=True):
            tool.param_groups[0]["lr"] = peak * rate_share(step, plan)
        length = plan.short_length if step < plan.steps - plan.long_steps else MAX_LENGTH
        with torch.autocast("cpu", torch.bfloat16, enabled=plan.bfloat16):
            shown += train_step(model, tools, batch(stream, step, length, plan))
        if (step + 1) % 10 == 0:
            rate = (step + 1 - first) * plan.tokens_per_step / (time.monotonic() - began)
            print(f"step {step + 1} loss {shown / 10:.4f} tokens/s {rate:.0f}", flush=True)
            shown = 0.0
        if (step + 1) % 50 == 0 or step + 1 == last:
            save(file, model, tools, step + 1)


def train_step(model: nn.Module, tools: list[torch.optim.Optimizer], rows: Tensor) -> float:
    """Take one optimiser step on `[rows, length + 1]` ids; return the mean loss in nats."""
    total = 0.0
    for part in rows.chunk(math.ceil(rows.numel() / PART_TOKENS)):
        logits = model(input_ids=part[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
        share = loss * (len(part) / len(rows))
        torch.autograd.backward([share])
        total += share.item()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for tool in tools:
        tool.step()
        tool.zero_grad()
    return total


def save(file: Path, model: nn.Module, tools: list[torch.optim.Optimizer], step: int) -> None:
    """Write a checkpoint; a reader sees the old one or the new one, never a part."""
    state = {"step": step, "model": model.state_dict(), "tools": [t.state_dict() for t in tools]}
    part = file.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, file)


def restore(file: Path, model: nn.Module, tools: list[torch.optim.Optimizer]) -> int:
    """Load a checkpoint where there is one; return the number of steps already taken."""
    if not file.exists():
        return 0
    state = torch.load(file)
    model.load_state_dict(state["model"])
    for tool, saved in zip(tools, state["tools"], strict=False):
        tool.load_state_dict(saved)
    return int(state["step"])


# --- Export, evaluation, samples ------------------------------------------------------------


def export(name: str, checkpoints: Path, folder: Path) -> None:
    """Write a Hugging Face folder in bfloat16, file by file, each whole when it appears."""
    model = new_model(PLANS[name])
    print(f"{name}: exporting after {restore(checkpoints / f'{name}.pt', model, [])} steps")
    model.generation_config = hub.GenerationConfig(**ENDS)
    tokenizer = hub.PreTrainedTokenizerFast(
        tokenizer_file=str(checkpoints / "tokenizer.json"),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        config = Path(temporary) / "tokenizer_config.json"  # name a class transformers 4 has too
        config.write_text(
            config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
        )
        for file in sorted(Path(temporary).iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


@torch.inference_mode()
def evaluate(out: Path, context: int) -> dict[str, float]:
    """Return both exported models' held-out bits per byte, and how often the draft agrees.

    The bfloat16 weights are computed in float32. Agreement is the share of held-out positions
    at which the draft's likeliest token is the main model's.
    """
    auto = hub.AutoModelForCausalLM
    nets = {name: auto.from_pretrained(out / name, dtype=torch.float32) for name in PLANS}
    tokenizer = Tokenizer.from_file(str(out / "main" / "tokenizer.json"))
    texts = corpus(held_out=True)
    nats = dict.fromkeys(PLANS, 0.0)
    agreed = total = 0
    for ids in encode(tokenizer, texts):
        for window, new in windows([END_OF_TEXT_ID, *ids], context, context // 2):
            best = {}
            for name, net in nets.items():
                logits = net(input_ids=window[None, :-1]).logits[0, -new:]
                nats[name] -= logits.log_softmax(-1).gather(1, window[-new:, None]).sum().item()
                best[name] = logits.argmax(-1)
            agreed += int((best["main"] == best["draft"]).sum())
            total += new
    size = sum(len(text.encode()) for text in texts)
    figures = {f"{name}_bits_per_byte": nats[name] / math.log(2) / size for name in PLANS}
    counts = {"files": len(texts), "bytes": size, "tokens": total}
    return figures | {"draft_agreement": agreed / total} | counts


def windows(ids: list[int], length: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Yield windows of a document and how many of each one's last ids are scored there.

    Every id but the first is scored once, and sees at least `length - stride` ids before it
    or the document's beginning.
    """
    scored = 1
    while scored < len(ids):
        end = min(len(ids), max(length, scored + stride))
        yield torch.tensor(ids[max(0, end - length) : end]), end - scored
        scored = end


def sample(folder: Path, prompts: tuple[str, ...], seed: int = 0) -> Iterator[str]:
    """Yield each prompt with its continuation at temperature 0.6."""
    model = hub.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    for prompt in prompts:
        torch.manual_seed(seed)
        ids: Any = tokenizer(prompt, return_tensors="pt")
        rows = model.generate(**ids, do_sample=True, temperature=0.6, top_k=0, max_new_tokens=120)
        yield str(tokenizer.decode(rows[0]))


if __name__ == "__main__":
    main()
