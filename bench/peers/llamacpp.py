"""llama.cpp by llama-cpp-python's C interface, in a loop like its server's; GGUF written here.

A batch is one token of every sequence that decodes and, with what is left of it, prompts. The file
has no vocabulary, since token ids go in and come out.
"""

import ctypes
from pathlib import Path

import llama_cpp as llama
import numpy as np
from gguf import GGMLQuantizationType
from llama_gguf import write
from protocol import Job, Run, Waves, serve

BATCH = 512


class Server:
    """One context for all sequences. `best` is q8_0 weights and its default float16 KV."""

    def __init__(self, job: Job) -> None:
        self.weight_bytes = 4.0 if job.exact else 34 / 32
        formats = "float32" if job.exact else "q8_0 weights, float16 KV, no AMX"
        self.label = f"llama.cpp ({llama.__version__} of its Python package), {formats}"
        llama.llama_log_set(_quiet, None)
        llama.llama_backend_init()
        loading = llama.llama_model_default_params()
        # Without AMX, whose kernels crash here as soon as a batch has more than one token.
        loading.use_extra_bufts = False
        self._model = llama.llama_model_load_from_file(str(job.converted).encode(), loading)
        params = llama.llama_context_default_params()
        params.n_ctx = job.kv_tokens + 256 * job.most_sequences
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = job.most_sequences
        params.n_threads = params.n_threads_batch = job.threads
        params.kv_unified = True
        if job.exact:
            params.type_k = params.type_v = int(GGMLQuantizationType.F32)
        self._context = llama.llama_init_from_model(self._model, params)
        assert self._context is not None, "no context"
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts, outputs) -> Run:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)
        waves = Waves(outputs)
        computed = [0] * len(prompts)
        while not waves.finished:
            sampling = self._fill(prompts, outputs, waves.run.tokens, computed)
            failed = llama.llama_decode(self._context, self._batch)
            assert failed == 0, f"llama_decode returned {failed}"
            for request, row in sampling:
                logits = llama.llama_get_logits_ith(self._context, row)
                row_view = np.ctypeslib.as_array(logits, shape=(self._vocabulary,))
                waves.add(request, int(row_view.argmax()))
                if len(waves.run.tokens[request]) == outputs[request]:
                    memory = llama.llama_get_memory(self._context)
                    llama.llama_memory_seq_rm(memory, request, -1, -1)
        return waves.run

    def _fill(self, prompts, outputs, tokens, computed) -> list[tuple[int, int]]:
        """Fill the batch; return (request, row) of those that sample."""
        self._batch.n_tokens = 0
        sampling = []
        for request, said in enumerate(tokens):
            if said and len(said) < outputs[request]:
                sampling.append((request, self._add(request, computed, said[-1], True)))
        for request, prompt in enumerate(prompts):
            room = BATCH - self._batch.n_tokens
            for token in prompt[computed[request] : computed[request] + room]:
                last = computed[request] == len(prompt) - 1
                row = self._add(request, computed, token, last)
                if last:
                    sampling.append((request, row))
        return sampling

    def _add(self, request: int, computed: list[int], token: int, samples: bool) -> int:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row] = token
        batch.pos[row] = computed[request]
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = request
        batch.logits[row] = samples
        batch.n_tokens += 1
        computed[request] += 1
        return row


@llama.llama_log_callback
def _quiet(level: int, text: bytes, data: ctypes.c_void_p) -> None:
    pass


def convert(job: Job) -> None:
    unfinished = Path(f"{job.converted}.unfinished")
    write(job.checkpoint, unfinished, "F32" if job.exact else "Q8_0")
    unfinished.rename(job.converted)


if __name__ == "__main__":
    serve(Server, convert)
