"""Writes tests/fixtures/gguf_quants.safetensors: random blocks of every GGUF number format engraft reads, and what gguf makes of them.

Run from the repository's root with gguf 0.19 and safetensors installed. The blocks are random bytes, so every bit of every field is
exercised; only the half-precision scales are drawn from finite numbers.
"""

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from gguf.quants import dequantize
from safetensors.numpy import save_file

# Byte offsets of the half-precision fields of a block.
SCALES = {
    Type.Q8_0: [0],
    Type.Q4_0: [0],
    Type.Q4_1: [0, 2],
    Type.Q5_0: [0],
    Type.Q5_1: [0, 2],
    Type.Q2_K: [80, 82],
    Type.Q3_K: [108],
    Type.Q4_K: [0, 2],
    Type.Q5_K: [0, 2],
    Type.Q6_K: [208],
    Type.IQ4_NL: [0],
    Type.IQ4_XS: [0],
}
NUMBERS = 512


def blocks(kind: Type, random: np.random.Generator) -> np.ndarray:
    """(blocks, bytes) u8"""
    if kind == Type.F32:
        return random.standard_normal((NUMBERS, 1), np.float32).view(np.uint8)
    if kind == Type.F16:
        return random.standard_normal((NUMBERS, 1), np.float32).astype(np.float16).view(np.uint8)
    if kind == Type.BF16:
        bits = random.standard_normal((NUMBERS, 1), np.float32).view(np.uint32) >> 16
        return bits.astype(np.uint16).view(np.uint8)
    values, size = GGML_QUANT_SIZES[kind]
    made = random.integers(0, 256, (NUMBERS // values, size), np.uint8)
    for at in SCALES[kind]:
        scales = random.standard_normal((len(made), 1)).astype(np.float16)
        made[:, at : at + 2] = scales.view(np.uint8)
    return made


def main() -> None:
    random = np.random.default_rng(7)
    tensors = {}
    for kind in [Type.F32, Type.F16, Type.BF16, *SCALES]:
        made = blocks(kind, random)
        tensors[f"{kind.name}.blocks"] = made
        tensors[f"{kind.name}.values"] = np.ascontiguousarray(dequantize(made, kind).reshape(-1), np.float32)
    save_file(tensors, "tests/fixtures/gguf_quants.safetensors")


if __name__ == "__main__":
    main()
