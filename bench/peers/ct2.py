"""CTranslate2: static batches of prompts of like length; the model is made by its converter."""

import json
import subprocess
import sys
from pathlib import Path

import ctranslate2
from protocol import Job, Run, Waves, serve

BATCH = 32


class StaticBatches:
    """Its Generator. `best` is int8 weights and activations."""

    def __init__(self, job: Job) -> None:
        self.weight_bytes = 4.0 if job.exact else 1.0
        self.label = f"CTranslate2 {ctranslate2.__version__}, {_format(job)}"
        self._generator = ctranslate2.Generator(
            str(job.converted),
            device="cpu",
            compute_type=_format(job),
            inter_threads=1,
            intra_threads=job.threads,
        )
        self._words = json.loads((job.converted / "vocabulary.json").read_text())

    def generate(self, prompts, outputs) -> Run:
        waves = Waves(outputs)
        order = sorted(range(len(prompts)), key=lambda i: outputs[i])
        for start in range(0, len(order), BATCH):
            self._batch(waves, order[start : start + BATCH], prompts, outputs)
        return waves.run

    def _batch(self, waves: Waves, chosen: list[int], prompts, outputs) -> None:
        longest = max(outputs[i] for i in chosen)

        def told(step) -> bool:
            request = chosen[step.batch_id]
            waves.add(request, step.token_id)
            return len(waves.run.tokens[request]) >= outputs[request]

        self._generator.generate_batch(
            [[self._words[token] for token in prompts[i]] for i in chosen],
            max_length=longest,
            min_length=longest,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=told,
        )


def _format(job: Job) -> str:
    return "float32" if job.exact else "int8"


def convert(job: Job) -> None:
    unfinished = Path(f"{job.converted}.unfinished")
    tool = Path(sys.executable).with_name("ct2-transformers-converter")
    command = [str(tool), "--model", str(job.checkpoint), "--output_dir", str(unfinished)]
    subprocess.run([*command, "--quantization", _format(job), "--force"], check=True)
    unfinished.rename(job.converted)


if __name__ == "__main__":
    serve(StaticBatches, convert)
