"""What torch gets out of the device: copies and reads of memory, a product of 8192³, attention of a prompt and of decode."""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import torch

from clock import seconds

HEADS, KV_HEADS, SIZE = 32, 8, 128


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", required=True)
    parser.add_argument("--out", type=Path, required=True)
    typed = parser.parse_args()
    device = typed.device
    # A processor takes the same in small, to see that this program runs.
    large = device.startswith("cuda")
    size, side, tokens, batch = (1 << 31, 8192, 8192, 32) if large else (1 << 22, 128, 128, 2)
    found = {"device": torch.cuda.get_device_name(device) if large else "cpu", "torch": torch.__version__}

    source = torch.zeros(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    found["copy_bytes_per_s"] = 2 * size / seconds(device, lambda: target.copy_(source))
    found["read_bytes_per_s"] = size / seconds(device, lambda: source.sum())
    del source, target

    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device) for _ in range(2))
    found["product_flop_per_s"] = 2 * side**3 / seconds(device, lambda: a @ b)
    del a, b

    attend = torch.nn.functional.scaled_dot_product_attention
    # As many heads of keys as of the query: not every kernel of torch's takes fewer.
    query, key, value = (torch.randn(1, HEADS, tokens, SIZE, dtype=torch.bfloat16, device=device) for _ in range(3))
    backend = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(backend) if large else contextlib.nullcontext():
        took = seconds(device, lambda: attend(query, key, value, is_causal=True))
    found["attention_prefill_flop_per_s"] = 2 * HEADS * SIZE * tokens * (tokens + 1) / took
    query = torch.randn(batch, HEADS, 1, SIZE, dtype=torch.bfloat16, device=device)
    key, value = (torch.randn(batch, KV_HEADS, tokens, SIZE, dtype=torch.bfloat16, device=device) for _ in range(2))
    took = seconds(device, lambda: attend(query, key, value, enable_gqa=True))
    found["attention_decode_bytes_per_s"] = 2 * key.numel() * key.element_size() / took
    typed.out.write_text(json.dumps(found))
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
