"""Writes tests/fixtures/gguf_encoded.safetensors: varied numbers, and the bytes that ggml's `quantize_row_*_ref` makes of them.

    python tests/python/gguf_encoded.py LIBRARY     (numpy, safetensors; a shared library with ggml's quants, such as libggml-base.so)

Blocks of every kind are among the numbers: of zeros, of one number, of one sign, tiny, large, with one number far from the others,
with ties.
"""

import ctypes
import sys

import numpy as np
from safetensors.numpy import save_file

# Name, numbers and bytes of a block, the function's middle.
FORMATS = [
    ("Q4_0", 32, 18, "q4_0"),
    ("Q4_1", 32, 20, "q4_1"),
    ("Q5_0", 32, 22, "q5_0"),
    ("Q5_1", 32, 24, "q5_1"),
    ("Q8_0", 32, 34, "q8_0"),
    ("Q4_K", 256, 144, "q4_K"),
    ("Q5_K", 256, 176, "q5_K"),
    ("Q6_K", 256, 210, "q6_K"),
]
# Blocks of 256; an odd number, because some are looked at in pairs.
BLOCKS = 27


def numbers() -> np.ndarray:
    """(blocks, 256) f32"""
    random = np.random.default_rng(11)
    x = (random.standard_normal((BLOCKS, 256)) * 0.05).astype(np.float32)
    x[0] = 0
    x[1] *= np.float32(1e-20)
    x[2] *= np.float32(1e4)
    x[3] *= np.float32(1e-8)
    x[4] = 0.3
    x[5] = np.abs(x[5]) + 1
    x[6] = -np.abs(x[6]) - 1
    x[7] *= np.float32(0.01)
    x[7, 3::50] = 7
    x[8] = (np.arange(256) % 16 - 8) * 0.5
    x[9, 32:] = 0
    x[9, 5] = -0.0
    x[10] = np.where(np.arange(256) % 2, 1, -1)
    x[11] = np.round(x[11] * 100) / 8
    x[12, ::2] = 0
    x[13] = np.linspace(-1, 1, 256)
    return x


def main() -> None:
    library = ctypes.CDLL(sys.argv[1])
    x = numbers()
    tensors = {"numbers": x.reshape(-1)}
    for name, values, size, middle in FORMATS:
        encode = getattr(library, f"quantize_row_{middle}_ref")
        encode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        encode.restype = None
        out = np.zeros(x.size // values * size, np.uint8)
        encode(x.ctypes.data, out.ctypes.data, x.size)
        tensors[name] = out
    save_file(tensors, "tests/fixtures/gguf_encoded.safetensors")


if __name__ == "__main__":
    main()
