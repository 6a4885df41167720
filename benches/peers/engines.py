"""The engines that are compared, each behind two calls: `prefill(tokens)` and `decode(batch)`, in tokens per second.

Run as a program, it holds one engine and measures once for each line on stdin, as `tidemill bench model --in-turns`
does. Prefill is a prompt and its first token. Decode is the time of `STEPS + 1` tokens less that of one, from prompts
of `CONTEXT` tokens, greedy, without stopping.
"""

import json
import sys
import time
from pathlib import Path

from common import prompt

CONTEXT = 32
STEPS = 16


class Generating:
    """An engine that is asked for whole answers."""

    def generate(self, prompts, tokens):
        """Answers all prompts with exactly so many tokens."""
        raise NotImplementedError

    def seconds(self, prompts, tokens):
        start = time.perf_counter()
        self.generate(prompts, tokens)
        return time.perf_counter() - start

    def prefill(self, tokens):
        return tokens / self.seconds([prompt(tokens)], 1)

    def decode(self, batch):
        prompts = lambda: [prompt(CONTEXT) for _ in range(batch)]
        # Once for nothing: some engines arrange their memory anew when another number of sequences comes.
        self.generate(prompts(), STEPS + 1)
        first = self.seconds(prompts(), 1)
        return batch * STEPS / (self.seconds(prompts(), STEPS + 1) - first)


class Transformers(Generating):
    def __init__(self, folder, threads):
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def generate(self, prompts, tokens):
        ids = self.torch.tensor(prompts)
        with self.torch.inference_mode():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=self.torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
        assert out.shape == (len(prompts), len(prompts[0]) + tokens), out.shape


class OpenVino(Generating):
    def __init__(self, folder, threads, precision):
        import openvino
        import openvino_genai

        self.openvino, self.genai = openvino, openvino_genai
        hints = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision}
        self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", **hints)

    def generate(self, prompts, tokens):
        import numpy

        ids = numpy.array(prompts, dtype=numpy.int64)
        inputs = self.genai.TokenizedInputs(
            self.openvino.Tensor(ids), self.openvino.Tensor(numpy.ones_like(ids))
        )
        config = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        config.eos_token_id = -1
        out = self.pipeline.generate(inputs, config)
        assert [len(answer) for answer in out.tokens] == [tokens] * len(prompts), [len(one) for one in out.tokens]


class CTranslate2(Generating):
    def __init__(self, folder, threads, compute):
        import ctranslate2

        options = dict(device="cpu", inter_threads=1, intra_threads=threads, compute_type=compute)
        self.generator = ctranslate2.Generator(str(folder), **options)
        vocabulary = json.loads((folder / "vocabulary.json").read_text())
        self.texts = dict(enumerate(vocabulary))

    def generate(self, prompts, tokens):
        texts = [[self.texts[id] for id in ids] for ids in prompts]
        options = dict(max_length=tokens, min_length=tokens, sampling_topk=1, end_token=[])
        out = self.generator.generate_batch(texts, include_prompt_in_result=False, **options)
        assert [len(one.sequences_ids[0]) for one in out] == [tokens] * len(prompts)


class LlamaCpp:
    """By the C API: the class for Python serves one sequence at a time."""

    def __init__(self, file, threads, batches):
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(file).encode(), llama_cpp.llama_model_default_params()
        )
        assert self.model, f"{file} is not read"
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        # One context for a long prompt, and one in which each of many sequences has its own cache, as its authors advise.
        self.alone = self.make_context(threads, sequences=1, tokens=4096)
        self.together = self.make_context(threads, sequences=max(batches), tokens=256 * max(batches))
        self.context = self.alone
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def make_context(self, threads, sequences, tokens):
        params = self.api.llama_context_default_params()
        params.n_threads = params.n_threads_batch = threads
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_seq_max, params.n_ctx = sequences, tokens
        context = self.api.llama_init_from_model(self.model, params)
        assert context, "no context"
        return context

    def begin(self, context):
        self.context = context
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), False)

    def run(self, rows):
        """Computes rows of (token, position, sequence, wants logits)."""
        for index, (token, position, sequence, wants) in enumerate(rows):
            self.batch.token[index], self.batch.pos[index] = token, position
            self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, sequence
            self.batch.logits[index] = wants
        self.batch.n_tokens = len(rows)
        status = self.api.llama_decode(self.context, self.batch)
        assert status == 0, f"llama_decode says {status}"

    def likeliest(self, row):
        import numpy

        logits = self.api.llama_get_logits_ith(self.context, row)
        return int(numpy.ctypeslib.as_array(logits, shape=(self.vocabulary,)).argmax())

    def prefill(self, tokens):
        self.begin(self.alone)
        ids = prompt(tokens)
        start = time.perf_counter()
        self.run([(id, index, 0, index + 1 == tokens) for index, id in enumerate(ids)])
        self.likeliest(tokens - 1)
        return tokens / (time.perf_counter() - start)

    def decode(self, batch):
        self.begin(self.together)
        for sequence in range(batch):
            ids = enumerate(prompt(CONTEXT))
            self.run([(id, index, sequence, index + 1 == CONTEXT) for index, id in ids])
        tokens = list(range(3, 3 + batch))
        start = time.perf_counter()
        for step in range(STEPS):
            self.run([(token, CONTEXT + step, sequence, True) for sequence, token in enumerate(tokens)])
            tokens = [self.likeliest(row) for row in range(batch)]
        return batch * STEPS / (time.perf_counter() - start)


def start(kind, folder, threads, batches):
    """The engine `kind` on what `prepare.py` left in `folder`."""
    match kind:
        case "transformers-bf16":
            return Transformers(folder / "model", threads)
        case "openvino-int8":
            return OpenVino(folder / "openvino-int8", threads, "f32")
        case "openvino-bf16":
            return OpenVino(folder / "openvino-bf16", threads, "bf16")
        case "ctranslate2-int8":
            return CTranslate2(folder / "ctranslate2-int8", threads, "int8")
        case "llama.cpp-q8_0":
            return LlamaCpp(folder / "llama-q8_0.gguf", threads, batches)
        case "llama.cpp-q4_0":
            return LlamaCpp(folder / "llama-q4_0.gguf", threads, batches)
        case "llama.cpp-bf16":
            return LlamaCpp(folder / "llama-bf16.gguf", threads, batches)
    raise SystemExit(f"there is no engine {kind}")


def main():
    kind, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    lengths, batches = ([int(size) for size in sizes.split(",") if size] for sizes in sys.argv[4:6])
    # Libraries print what they like; answers go where stdout was.
    answers, sys.stdout = sys.stdout, sys.stderr
    engine = start(kind, folder, threads, batches or [1])
    # Some compile their code for each shape when it first comes.
    for length in lengths:
        engine.prefill(length)
    for batch in batches:
        engine.decode(batch)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        phase, size = line.split()
        measure = {"prefill": engine.prefill, "decode": engine.decode}[phase]
        print(json.dumps({"tokens_per_s": measure(int(size))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
