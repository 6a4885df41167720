"""Turns the model into what each engine reads, once; what is there is left as it is."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import make_model


def tool(name):
    return str(Path(sys.executable).parent / name)


def openvino(model, folder, weights):
    run = [tool("optimum-cli"), "export", "openvino", "--model", model, "--task", "text-generation-with-past"]
    subprocess.run([*run, "--weight-format", weights, folder], check=True)


def ctranslate2(model, folder):
    converter = [tool("ct2-transformers-converter"), "--model", model, "--output_dir", folder]
    subprocess.run([*converter, "--quantization", "int8"], check=True)


def gguf(model, file, kind):
    """llama.cpp pairs the elements of a head in rotary embedding as neighbours: rows of query and key are moved."""
    import gguf
    import numpy
    from safetensors.torch import load_file

    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name(model.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    tokens = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(tokens, key=tokens.get))
    kinds = [gguf.TokenType.CONTROL if id < 3 else gguf.TokenType.NORMAL for id in range(len(tokens))]
    writer.add_token_types(kinds)
    writer.add_token_merges(["w 0"])  # llama.cpp refuses a file without any; `w0` is the first token behind the bytes
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    stored = {"bf16": gguf.GGMLQuantizationType.BF16, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    stored["q4_0"] = gguf.GGMLQuantizationType.Q4_0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in load_file(model / "model.safetensors").items():
        values = tensor.float().numpy()
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:
                halves = values.reshape(count, 2, values.shape[0] // count // 2, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        type_ = stored[kind] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        values = gguf.quants.quantize(numpy.ascontiguousarray(values), type_)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prepare(shape, folder, kinds):
    """Everything that `kinds` need for `shape`, in `folder`."""
    model = folder / "model"
    made = {
        "transformers-bf16": (model, lambda _: None),
        "openvino-int8": (folder / "openvino-int8", lambda to: openvino(model, to, "int8")),
        "openvino-bf16": (folder / "openvino-bf16", lambda to: openvino(model, to, "fp16")),
        "ctranslate2-int8": (folder / "ctranslate2-int8", lambda to: ctranslate2(model, to)),
        "llama.cpp-q8_0": (folder / "llama-q8_0.gguf", lambda to: gguf(model, to, "q8_0")),
        "llama.cpp-q4_0": (folder / "llama-q4_0.gguf", lambda to: gguf(model, to, "q4_0")),
        "llama.cpp-bf16": (folder / "llama-bf16.gguf", lambda to: gguf(model, to, "bf16")),
    }
    if not model.exists():
        make_model.make(shape, model)
    for kind in kinds:
        path, make = made[kind]
        if path.exists():
            continue
        # Under another name until it is whole, so that a half is never taken for it.
        unfinished = path.with_name("unfinished-" + path.name)
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        make(unfinished)
        unfinished.rename(path)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("shape", choices=make_model.SHAPES)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("kinds", nargs="+")
    typed = arguments.parse_args()
    prepare(typed.shape, typed.folder, typed.kinds)
