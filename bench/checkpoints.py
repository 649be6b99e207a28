"""Random Llama checkpoints for benchmarks: right in shape and size, and no use for anything else.

    python bench/checkpoints.py --models tiny,110m,1b --folder /tmp/checkpoints

Weights are drawn from a fixed seed and saved as bfloat16 in one file, so that each engine, whatever
it converts them to, computes the same model. The tokenizer is the demo model's: its vocabulary is
smaller than the model's, and its token ids are all that it is needed for.
"""

import argparse
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

TOKENIZER_FROM = Path(__file__).resolve().parents[1] / "demo_model" / "main"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
DEFAULT_FOLDER = Path(tempfile.gettempdir()) / "baton-bench-checkpoints"


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides a Llama model's size; embeddings are untied."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int = 4096

    @property
    def weights_per_token(self) -> int:
        """Weights that decoding one token reads: all matrices but the input embedding's."""
        head_dim = self.hidden // self.heads
        attention = self.hidden * head_dim * 2 * (self.heads + self.kv_heads)
        mlp = 3 * self.hidden * self.intermediate
        return self.layers * (attention + mlp) + self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.weights_per_token + self.vocabulary * self.hidden + norms


SHAPES = {
    "tiny": Shape(384, 6, 1024, 6, 2, 8192),
    "110m": Shape(768, 12, 2048, 12, 4, 24576),
    "1b": Shape(2048, 16, 8192, 32, 8, 32000),
}


def checkpoint(name: str, folder: Path) -> Path:
    """Return the checkpoint folder of `name` under `folder`, making it if it is not there.

    Making it needs torch and transformers.
    """
    target = folder / name
    if not target.exists():
        unfinished = folder / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        _save(SHAPES[name], unfinished)
        unfinished.rename(target)
    return target


def _save(shape: Shape, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        tie_word_embeddings=False,
        # With the usual 0.02 greedy output soon repeats itself, and says little of the KV cache.
        initializer_range=shape.hidden**-0.5,
        bos_token_id=0,
        eos_token_id=0,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder, max_shard_size="100GB")
    for file in TOKENIZER_FILES:
        shutil.copy(TOKENIZER_FROM / file, folder / file)


def main() -> None:
    """Make checkpoints, and say how large they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(SHAPES), help="comma-separated")
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args()
    for name in options.models.split(","):
        path = checkpoint(name, options.folder)
        print(f"{name}: {SHAPES[name].parameters / 1e6:.1f} M parameters in {path}")


if __name__ == "__main__":
    main()
