"""Writes tests/fixtures/bnb_quants.safetensors: tensors, and what bitsandbytes 0.50.2 makes of them on the CPU.

For each case `NAME`: `NAME` is the tensor; `NAME.TYPE.BLOCK` (4 bit), `.nested` and `NAME.int8` hold the parts that bitsandbytes stores, and
`.f32`, `.f16`, `.bf16` the numbers that they stand for.
"""

import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file

KINDS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def cases() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    normal = torch.randn(24, 64)
    wide = torch.randn(6, 128) * 10 ** (torch.rand(6, 128) * 9 - 6)
    zeros = torch.randn(4, 64)
    zeros[1] = 0
    zeros[3, 5:] = -0.0
    tiny = torch.randn(3, 64) * torch.tensor([[1e-39], [1e-42], [1e-37]])
    # Every bound between two codes, and its neighbours, in blocks whose largest is 1.
    bounds = []
    for kind in ("nf4", "fp4"):
        code = bnb.get_4bit_type(kind, device="cpu").sort().values
        middle = (code[1:] + code[:-1]) / 2
        near = torch.cat([middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1), code])
        bounds.append(torch.cat([torch.ones(1), near, torch.zeros(64 - 1 - near.numel())]) if near.numel() < 64 else near[:64])
    return {
        "normal": normal,
        "normal_f16": (normal * 0.02).half(),
        "normal_bf16": (normal * 0.02).bfloat16(),
        "wide": wide,
        "extreme_f16": torch.tensor([65504.0, -65504.0, 6e-8, -6e-8]).repeat(32).half().reshape(2, 64),
        "constant": torch.full((2, 64), -0.37),
        "zeros": zeros,
        "denormal": tiny,
        "bounds": torch.stack(bounds),
        # Rows that are no multiple of a block or of two, and a last block that is cut.
        "odd": torch.randn(7, 9),
        "rows": torch.randn(5, 22),
        # Over 256 blocks of 32, so that absmax itself has a second block.
        "many_bf16": (torch.randn(290, 33) * torch.rand(290, 1)).bfloat16(),
    }


def four_bit(out: dict, name: str, tensor: torch.Tensor, kind: str, block: int, nested: bool) -> None:
    place = f"{name}.{kind}.{block}" + (".nested" if nested else "")
    packed, state = bnb.quantize_4bit(tensor, blocksize=block, quant_type=kind, compress_statistics=nested)
    out[f"{place}.packed"] = packed
    out[f"{place}.absmax"] = state.absmax
    if nested:
        out[f"{place}.nested_absmax"] = state.state2.absmax
        out[f"{place}.nested_offset"] = state.offset.reshape(1)
    for short, dtype in KINDS.items():
        state.dtype = dtype
        out[f"{place}.{short}"] = bnb.dequantize_4bit(packed, state)


def main() -> None:
    out: dict[str, torch.Tensor] = {}
    for name, tensor in cases().items():
        out[name] = tensor
        for kind in ("nf4", "fp4"):
            if not name.startswith("many"):
                four_bit(out, name, tensor, kind, 64, nested=False)
            if not name.startswith("many") or kind == "nf4":
                four_bit(out, name, tensor, kind, 32, nested=True)
        codes, absmax, _ = bnb.int8_vectorwise_quant(tensor.half())
        out[f"{name}.int8.codes"], out[f"{name}.int8.absmax"] = codes, absmax
        out[f"{name}.int8.f32"] = bnb.int8_vectorwise_dequant(codes, absmax)
    out["nf4.code"] = bnb.get_4bit_type("nf4", device="cpu")
    out["fp4.code"] = bnb.get_4bit_type("fp4", device="cpu")
    out["dynamic.code"] = bnb.create_dynamic_map()
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/bnb_quants.safetensors")
    save_file({name: value.contiguous() for name, value in out.items()}, path)


if __name__ == "__main__":
    main()
