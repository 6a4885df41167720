"""The model that `tidemill bench model --shape llama-3-8b` measures, by transformers, with random weights: decode of one sequence eager
and compiled with a static cache, and prompts with torch's flash attention."""

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

from clock import seconds


def model_of(device, tiny):
    sizes = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    if tiny:
        sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=16384, rope_theta=500000.0)
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).eval()
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--mode", default="max-autotune", help="of torch.compile")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    typed = parser.parse_args()
    device, context = typed.device, 16 if typed.tiny else typed.context
    model, found = model_of(device, typed.tiny), {"transformers": transformers.__version__, "context": context}

    def tell(name, value):
        # Written each time, so that what comes after may run out of time.
        found[name] = value
        typed.out.write_text(json.dumps(found))
        print(f"{name}: {value:.2f}", flush=True)

    with torch.inference_mode():
        for tokens in (16,) if typed.tiny else (2048, 8192):
            prompt = torch.zeros(1, tokens, dtype=torch.long, device=device)
            took = seconds(device, lambda prompt=prompt: model(prompt, use_cache=True, logits_to_keep=1), times=3, warm=1)
            tell(f"prefill_{tokens}_tokens_per_s", tokens / took)

        cache = transformers.StaticCache(config=model.config, max_cache_len=context + 64)
        prompt = torch.zeros(1, context, dtype=torch.long, device=device)
        model(prompt, past_key_values=cache, cache_position=torch.arange(context, device=device), logits_to_keep=1)
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        position = torch.tensor([context], device=device)

        def step(run):
            # The same place again and again: the work is that of a step, and the cache does not fill up.
            return run(token, past_key_values=cache, cache_position=position, position_ids=position.unsqueeze(0))

        tell("decode_1_eager_tokens_per_s", 1 / seconds(device, lambda: step(model), times=10, warm=3))
        if typed.tiny:
            return 0
        compiled = torch.compile(model, mode=typed.mode, fullgraph=False)
        tell("decode_1_compiled_tokens_per_s", 1 / seconds(device, lambda: step(compiled), times=20, warm=5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
