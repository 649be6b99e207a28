"""Hugging Face transformers: `generate` on a padded batch, and continuous batching."""

import torch
import transformers
from protocol import Engine, Job, Run, Waves, serve
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer


class Padded:
    """`generate`: one static batch, padded on the left, as long as its longest request."""

    def __init__(self, job: Job) -> None:
        self.weight_bytes = 4.0 if job.exact else 2.0
        self._model = load_model(job)
        self.label = f"transformers {transformers.__version__} generate, {self._model.dtype}"

    def generate(self, prompts, outputs) -> Run:
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        streamer = _Streamer(Waves(outputs))
        config = greedy(max_new_tokens=max(outputs), min_new_tokens=max(outputs))
        with torch.inference_mode():
            self._model.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                generation_config=config,
                streamer=streamer,
            )
        return streamer.waves.run


class Continuous:
    """`generate_batch`'s manager: paged and iteration-level."""

    def __init__(self, job: Job) -> None:
        self.weight_bytes = 4.0 if job.exact else 2.0
        self._model = load_model(job, attention="paged|sdpa")
        self._sequences = job.most_sequences
        self._blocks = job.kv_tokens // 32 + 2 * job.most_sequences
        self.label = f"transformers {transformers.__version__} continuous, {self._model.dtype}"

    def generate(self, prompts, outputs) -> Run:
        waves = Waves(outputs)
        config = transformers.ContinuousBatchingConfig(
            page_size=32,
            num_blocks=self._blocks,
            max_batch_tokens=512,
            max_requests_per_batch=self._sequences,
            allow_block_sharing=False,
        )
        with self._model.continuous_batching_context_manager(
            generation_config=greedy(), continuous_batching_config=config, block=True, timeout=5
        ) as manager:
            waves = Waves(outputs)
            numbers = {}
            for number, (prompt, wanted) in enumerate(zip(prompts, outputs, strict=True)):
                name = manager.add_request(
                    list(prompt), max_new_tokens=wanted, streaming=True, eos_token_id=-1
                )
                numbers[name] = number
            while not waves.finished:
                result = manager.get_result(timeout=1)
                if result is None:
                    assert manager.is_running(), "the generation thread ended"
                    continue
                assert result.error is None, result.error
                number = numbers[result.request_id]
                for token in result.generated_tokens[len(waves.run.tokens[number]) :]:
                    waves.add(number, token)
        return waves.run


class _Streamer(BaseStreamer):
    def __init__(self, waves: Waves) -> None:
        self.waves = waves
        self._prompts_seen = False

    def put(self, value) -> None:
        if not self._prompts_seen:
            self._prompts_seen = True
            return
        for request, token in enumerate(value.tolist()):
            self.waves.add(request, token)

    def end(self) -> None:
        pass


def load_model(job: Job, attention: str = "sdpa"):
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(
        job.checkpoint,
        dtype=torch.float32 if job.exact else torch.bfloat16,
        attn_implementation=attention,
    ).eval()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model


def greedy(**limits: int) -> GenerationConfig:
    return GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, **limits)


def load(job: Job) -> Engine:
    return {"hf-generate": Padded, "hf-continuous": Continuous}[job.engine](job)


if __name__ == "__main__":
    serve(load)
