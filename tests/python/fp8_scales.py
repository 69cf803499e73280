"""Writes tests/fixtures/fp8_scales.safetensors and fp8_experts.safetensors: weights in fp8 with their scales, and what torch
and transformers make of them.

Run from the repository's root with torch, transformers and safetensors installed. `X.weight` and `X.weight_scale_inv` are as
published; `X.float32` and `X.bfloat16` are the numbers they stand for.
"""

import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

BLOCK = 128


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Every finite number of a type, in random order."""
    every = torch.arange(256, dtype=torch.uint8)
    finite = every[every.view(dtype).float().isfinite()]
    chosen = torch.randint(len(finite), shape)
    chosen.view(-1)[: len(finite)] = torch.randperm(len(finite))
    return finite[chosen].view(dtype)


def spread(scales: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The scale of each number."""
    if scales.numel() == 1:
        return scales.float().expand(shape)
    rows, columns = (torch.arange(size) // BLOCK for size in shape)
    return scales.float()[rows][:, columns]


def main() -> None:
    torch.manual_seed(11)
    tensors = {}
    for name, shape, dtype, scales in [
        ("odd", (140, 131), torch.float8_e4m3fn, torch.rand(2, 2) * 3e-3),
        ("narrow", (3, 257), torch.float8_e4m3fn, (torch.rand(1, 3) * 3e-3).bfloat16()),
        ("e5m2", (17, 31), torch.float8_e5m2, torch.rand(1, 1) * 3e-5),
        ("whole", (17, 31), torch.float8_e4m3fn, torch.tensor(7.3e-4)),
    ]:
        weight = drawn(shape, dtype)
        values = weight.float() * spread(scales, weight.shape)
        tensors |= {f"{name}.weight": weight, f"{name}.weight_scale_inv": scales}
        tensors |= {f"{name}.float32": values, f"{name}.bfloat16": values.bfloat16()}

    # transformers does the same where it can: it asks for whole blocks.
    weight, scales = drawn((2 * BLOCK, BLOCK), torch.float8_e4m3fn), torch.rand(2, 1)
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scales, torch.float32)
    assert torch.equal(theirs, weight.float() * spread(scales, weight.shape))
    save_file(tensors, "tests/fixtures/fp8_scales.safetensors")
    save_file(experts(), "tests/fixtures/fp8_experts.safetensors")


def experts() -> dict[str, torch.Tensor]:
    """Scales that are exponents, and stacked weights, in blocks of 4 x 8: as transformers reads them, which asks for whole blocks,
    so edges are cut off afterwards. `parts` has a scale for each half of an expert's rows."""
    exponents = lambda *shape: torch.randint(100, 135, shape, dtype=torch.uint8)
    whole = {
        "exponents.weight": (drawn((12, 24), torch.float8_e4m3fn), exponents(3, 3).view(torch.float8_e8m0fnu), (10, 19)),
        "bytes.weight": (drawn((12, 24), torch.float8_e4m3fn), exponents(3, 3), (12, 24)),
        "stacked": (drawn((3, 8, 16), torch.float8_e4m3fn), exponents(3, 2, 2).view(torch.float8_e8m0fnu), (7, 13)),
        "parts": (drawn((3, 8, 12), torch.float8_e5m2), torch.rand(3, 2, 1) * 3e-3, (8, 12)),
    }
    whole["exponents.weight"][1].view(torch.uint8)[0, 1] = 0  # 2^-127 is subnormal
    tensors = {}
    for name, (weight, scales, (rows, columns)) in whole.items():
        tensors[name] = weight[..., :rows, :columns].contiguous()
        tensors[f"{name}_scale_inv"] = scales
        for dtype in (torch.float32, torch.bfloat16):
            values = Fp8Dequantize(None)._dequantize_one(weight, scales, dtype)[..., :rows, :columns]
            tensors[f"{name}.{str(dtype).removeprefix('torch.')}"] = values.contiguous()
    return tensors


if __name__ == "__main__":
    main()
