"""Writes tests/fixtures/mxfp4_blocks.safetensors: experts in MXFP4, and what transformers makes of them.

Run from the repository's root with torch, transformers and safetensors installed. `blocks` and `scales` are laid out as
gpt-oss's are; `float32` and `bfloat16` are the numbers they stand for.
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

EXPERTS, ROWS, BLOCKS = 2, 6, 3


def main() -> None:
    torch.manual_seed(5)
    blocks = torch.randint(256, (EXPERTS, ROWS, BLOCKS, 16), dtype=torch.uint8)
    scales = torch.randint(118, 132, (EXPERTS, ROWS, BLOCKS), dtype=torch.uint8)
    tensors = {"blocks": blocks, "scales": scales}
    for name, dtype in [("float32", torch.float32), ("bfloat16", torch.bfloat16)]:
        tensors[name] = convert_moe_packed_tensors(blocks.clone(), scales.clone(), dtype=dtype).contiguous()
    save_file(tensors, pathlib.Path(__file__).resolve().parent.parent / "fixtures/mxfp4_blocks.safetensors")


if __name__ == "__main__":
    main()
