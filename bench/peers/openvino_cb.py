"""OpenVINO GenAI with continuous batching; the model is exported by optimum-intel."""

import subprocess
import sys

import numpy as np
import openvino_genai as genai
from openvino import Tensor
from protocol import Job, Run, Waves, serve


class ContinuousBatching:
    """Its pipeline, step by step. `best` is int8 weights and what the plugin then chooses."""

    def __init__(self, job: Job) -> None:
        self.weight_bytes = 4.0 if job.exact else 1.0
        formats = "float32" if job.exact else "int8 weights, its own choice of the rest"
        self.label = f"OpenVINO GenAI {genai.__version__}, {formats}"
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = job.kv_tokens // 16 + 4 * job.most_sequences
        scheduler.max_num_seqs = max(job.most_sequences, 2)
        scheduler.max_num_batched_tokens = 512
        scheduler.enable_prefix_caching = False
        properties: dict[str, object] = {"INFERENCE_NUM_THREADS": job.threads}
        if job.exact:
            properties |= {
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            }
        self._pipe = genai.ContinuousBatchingPipeline(
            str(job.converted), scheduler, "CPU", properties
        )

    def generate(self, prompts, outputs) -> Run:
        waves = Waves(outputs)
        handles = []
        for number, (prompt, wanted) in enumerate(zip(prompts, outputs, strict=True)):
            config = genai.GenerationConfig(max_new_tokens=wanted, ignore_eos=True)
            ids = Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self._pipe.add_request(number, ids, config))
        while self._pipe.has_non_finished_requests():
            self._pipe.step()
            for number, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        for token in output.generated_ids:
                            waves.add(number, token)
        return waves.run


def convert(job: Job) -> None:
    unfinished = job.converted.with_name(job.converted.name + ".unfinished")
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    command += ["--model", str(job.checkpoint), "--task", "text-generation-with-past"]
    command += ["--weight-format", "fp32" if job.exact else "int8", str(unfinished)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    unfinished.rename(job.converted)


if __name__ == "__main__":
    serve(ContinuousBatching, convert)
