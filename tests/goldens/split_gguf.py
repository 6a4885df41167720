"""Writes `tests/fixtures/quantized/gguf-q4_0-parts/`: the file of `gguf-q4_0` again, in parts, as its format's own library makes them.

    python split_gguf.py
"""

import shutil

import gguf
from gguf import GGUFValueType as Type

import tiny_tokenizer

MODELS = tiny_tokenizer.FIXTURES / "quantized"
WHOLE = MODELS / "gguf-q4_0" / "model.gguf"
PARTS = MODELS / "gguf-q4_0-parts"
MOST_TENSORS = 9
"""In a part: three parts, the last one shorter."""


def main() -> None:
    """Copies every value and every tensor, as they are stored."""
    shutil.rmtree(PARTS, ignore_errors=True)
    PARTS.mkdir()
    reader = gguf.GGUFReader(WHOLE)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(PARTS / "model.gguf", architecture, split_max_tensors=MOST_TENSORS)
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue
        kind = field.types[0]
        writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == Type.ARRAY else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for file in sorted(PARTS.iterdir()):
        part = gguf.GGUFReader(file)
        print(file.name, len(part.tensors), "tensors,", len(part.fields), "values,", file.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
