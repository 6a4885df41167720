"""Compiles every kernel with NVRTC, as a machine with a GPU does when it starts: from the sources alone, with no header of the toolkit.

Usage: nvrtc.py ARCHITECTURE…
"""

import ctypes
import pathlib
import sys

NVRTC = "libnvrtc.so.13"


def main(architectures: list[str]) -> int:
    nvrtc = ctypes.CDLL(NVRTC)
    folder = pathlib.Path(__file__).parent
    headers = {path.name: path.read_bytes() for path in sorted(folder.glob("*.cuh"))}
    failures, images = 0, 0
    for source in sorted(folder.glob("*.cu")):
        for architecture in architectures:
            # What only Hopper has is for Hopper alone.
            if source.name.startswith("hopper_") and architecture != "sm_90a":
                continue
            images += 1
            log = compile_one(nvrtc, source, headers, architecture)
            if log is not None:
                failures += 1
                print(f"{source.name} for {architecture} by NVRTC:\n{log}", file=sys.stderr)
    if failures == 0:
        print(f"NVRTC: {images} images")
    return failures


def compile_one(nvrtc, source: pathlib.Path, headers: dict[str, bytes], architecture: str) -> str | None:
    """What the compiler complains about, or nothing."""
    program = ctypes.c_void_p()
    texts = (ctypes.c_char_p * len(headers))(*headers.values())
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(headers), texts, names
    )
    assert created == 0, f"nvrtcCreateProgram: {created}"
    options = [f"--gpu-architecture={architecture}", "--std=c++17", "--no-source-include"]
    result = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    )
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    image = ctypes.c_size_t()
    no_image = nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(image)) != 0 or image.value == 0
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode(errors="replace").strip()
    return text or f"result {result}" if result != 0 or no_image or text else None


if __name__ == "__main__":
    sys.exit(1 if main(sys.argv[1:]) else 0)
