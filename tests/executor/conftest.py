"""Models, references and a driver that plays the scheduler, for the tests of the executor."""

import dataclasses
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from baton.core.ids import BlockId, SeqId
from baton.core.request import SamplingParams
from baton.engine.step import ScheduledSequence, StepPlan
from baton.executor.batch import make_batch
from baton.executor.gpu_queue import EagerQueue, GpuQueue
from baton.executor.kv_cache import KVCache, make_layout
from baton.executor.late_queue import LateQueue
from baton.executor.native_pass import NativePass
from baton.executor.runner import ModelRunner
from baton.kernels.attention import Workspace
from baton.kernels.native.build import NoNativeCode
from baton.kernels.native.library import load_library
from baton.models.decoder import Decoder
from baton.models.loader import Model, load_model
from baton.models.native import NativeDecoder
from baton.models.tokenizer import load_tokenizer

# The ranks' processes import the tests by their full names.
sys.path.append(str(Path(__file__).parents[2]))

from tests.parallel.ranks import RankProcesses

GREEDY = SamplingParams(temperature=0.0)
PROMPT_LENGTHS = (1, 5, 16, 33, 100, 17)
OUTPUT = 64


@dataclasses.dataclass
class Track:
    """One sequence that the driver keeps."""

    tokens: list[int]
    blocks: tuple[BlockId, ...]
    sampling: SamplingParams
    wanted: int
    computed: int = 0


class Driver:
    """Makes plans as a scheduler would: chunks of prompts and single tokens, mixed in one batch."""

    def __init__(self, model: Model, *, block_size: int = 16, num_blocks: int = 128) -> None:
        layout = make_layout(model.spec, block_size, model.dtype)
        self.kv = KVCache(layout, num_blocks)
        self.runner = ModelRunner(model, self.kv)
        self._model = model
        self._free = [BlockId(block) for block in range(num_blocks)]
        random.Random(block_size).shuffle(self._free)
        self._step = 0

    def add(self, prompt: Sequence[int], wanted: int, sampling: SamplingParams) -> Track:
        """Give a prompt its blocks, scattered over the pool."""
        count = self.kv.layout.blocks_for(len(prompt) + wanted)
        blocks = tuple(self._free.pop() for _ in range(count))
        return Track(list(prompt), blocks, sampling, len(prompt) + wanted)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        chunk: int = 1000,
        output: int = OUTPUT,
        sampling: SamplingParams = GREEDY,
        arrive_every: int = 0,
    ) -> list[list[int]]:
        """Return each prompt's output; prompts arrive all at once or every so many steps."""
        sequences = [self.add(prompt, output, sampling) for prompt in prompts]
        first = self._step
        while any(len(s.tokens) < s.wanted for s in sequences):
            here = 1 + (self._step - first) // arrive_every if arrive_every else len(sequences)
            open_ones = [
                (SeqId(i), s) for i, s in enumerate(sequences[:here]) if len(s.tokens) < s.wanted
            ]
            if not open_ones:
                self._step += 1
                continue
            self._run(open_ones, chunk)
        return [s.tokens[len(p) :] for s, p in zip(sequences, prompts, strict=True)]

    def _run(self, open_ones: Sequence[tuple[SeqId, Track]], chunk: int) -> None:
        parts = []
        for seq_id, s in open_ones:
            new = tuple(s.tokens[s.computed : s.computed + chunk])
            samples = s.computed + len(new) == len(s.tokens)
            parts.append(ScheduledSequence(seq_id, new, s.computed, s.blocks, samples, s.sampling))
        result = self.runner.execute(StepPlan(self._step, tuple(parts)))
        assert result.step == self._step
        assert result.tokens.keys() == {p.seq_id for p in parts if p.samples}
        for (seq_id, s), part in zip(open_ones, parts, strict=True):
            s.computed = part.end
            if part.samples:
                s.tokens.append(result.tokens[seq_id])
        self._step += 1

    def logits(self, texts: Sequence[Sequence[int]], *, chunk: int) -> list[Tensor]:
        """Return each text's logits [length, vocabulary], computed chunk by chunk, side by side."""
        sequences = [self.add(text, 0, GREEDY) for text in texts]
        found: list[list[Tensor]] = [[] for _ in texts]
        forward = _Forward(self._model, self.kv)
        while any(s.computed < len(s.tokens) for s in sequences):
            parts = []
            for i, s in enumerate(sequences):
                if new := tuple(s.tokens[s.computed : s.computed + chunk]):
                    parts.append(
                        ScheduledSequence(SeqId(i), new, s.computed, s.blocks, True, GREEDY)
                    )
            for part, rows in zip(parts, forward(parts), strict=True):
                found[part.seq_id].append(rows)
                sequences[part.seq_id].computed = part.end
        return [torch.cat(pieces) for pieces in found]


class _Forward:
    """Computes the logits of all tokens of a step, not only of those that are sampled."""

    def __init__(self, model: Model, kv: KVCache) -> None:
        self._model = model
        self._kv = kv
        self._native = NativePass(model, kv) if isinstance(model, NativeDecoder) else None
        self._workspace = Workspace()

    def __call__(self, parts: Sequence[ScheduledSequence]) -> list[Tensor]:
        """Return [tokens, vocabulary] for each part."""
        plan = StepPlan(0, tuple(parts))
        if self._native is not None:
            rows = self._native.logits_of_all(plan)
            return list(rows.split([len(part.tokens) for part in parts]))
        assert isinstance(self._model, Decoder)
        batch = make_batch(plan, self._kv.layout, windows=self._model.spec.windows)
        everything = torch.arange(len(batch.model.tokens))
        model_input = dataclasses.replace(batch.model, sampled=everything)
        logits = self._model.forward(model_input, self._kv.layers, self._workspace)
        last = batch.model.sampled.tolist()
        end_of = {row.seq_id: i + 1 for row, i in zip(batch.sampled, last, strict=True)}
        return [logits[end_of[p.seq_id] - len(p.tokens) : end_of[p.seq_id]] for p in parts]


class Reference:
    """The same checkpoint in transformers, in float32."""

    def __init__(self, folder: Path, lengths: Sequence[int] = PROMPT_LENGTHS) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = _prompt_ids(folder, self.model.config.vocab_size)
        self.prompts = [[next(ids) for _ in range(length)] for length in lengths]
        self.outputs = [self.generate(prompt) for prompt in self.prompts]

    def generate(self, prompt: Sequence[int]) -> list[int]:
        """Return OUTPUT greedy tokens."""
        found = self.model.generate(
            torch.tensor([list(prompt)]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=OUTPUT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return [int(token) for token in found[0, len(prompt) :]]

    def logits(self, text: Sequence[int]) -> Tensor:
        """Return the logits [length, vocabulary]."""
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([list(text)])).logits[0]
        return logits


def _prompt_ids(folder: Path, vocabulary: int) -> Iterator[int]:
    """Return random ids, or, for a model that has learned something, ids of Python code."""
    if (folder / "tokenizer.json").is_file():
        yield from load_tokenizer(folder).encode(inspect.getsource(random))
    chosen = random.Random(7)
    while True:
        yield chosen.randrange(1, vocabulary)


@pytest.fixture(params=["eager", "late"])
def queue(request: pytest.FixtureRequest) -> Iterator[GpuQueue]:
    """What stands in for a GPU: at once, or in another thread that completes late."""
    if request.param == "eager":
        yield EagerQueue()
        return
    late = LateQueue()
    yield late
    late.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[RankProcesses]:
    """Runs functions on ranks; its processes are started once and used by all tests of a file."""
    with RankProcesses() as processes:
        yield processes


class MakeDriver(Protocol):
    def __call__(self, model: Model, *, block_size: int = 16, num_blocks: int = 128) -> Driver: ...


@pytest.fixture(scope="session")
def make_driver() -> MakeDriver:
    return Driver


@pytest.fixture(scope="session")
def make_reference() -> Callable[..., Reference]:
    return Reference


@pytest.fixture(scope="session", params=["untied", "tied, sharded, bfloat16", "demo"])
def checkpoint(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    write_llama: Callable[..., Path],
    demo_model_dir: Path,
) -> Path:
    """Checkpoint folders that must all give what transformers gives."""
    folder = tmp_path_factory.mktemp("checkpoint") / "llama"
    if request.param == "demo":
        return demo_model_dir
    if request.param == "untied":
        return write_llama(folder)
    return write_llama(
        folder, seed=1, tie_word_embeddings=True, max_shard_size="500KB", dtype="bfloat16"
    )


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="session", params=["native", "torch"])
def executor(request: pytest.FixtureRequest) -> str:
    """Both executors must give the same; without a compiler there is only one."""
    if request.param == "native":
        try:
            load_library()
        except NoNativeCode as error:
            pytest.skip(str(error))
    return str(request.param)


@pytest.fixture(scope="session")
def model(checkpoint: Path, executor: str) -> Model:
    return load_model(checkpoint, executor=executor)
