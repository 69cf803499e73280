"""Writes tests/fixtures/peft/combined.safetensors: three adapters of tests/fixtures/peft as one, by PEFT's own add_weighted_adapter.

    python tests/python/combined.py        (torch 2.11.0, transformers 5.17.0, peft 0.21.2)

On base-tied: all-linear, names and layers with weights 0.7, -0.3 and 0.5, at density 0.6 where numbers are dropped:

    <kind>.<module>.lora_A (R, in), .lora_B (out, R)    of the kinds that sum factors
    <kind>.<module>.product (out, in)                   of those that split products again, whose factors' signs are chance

`ties_frequency` elects signs by number, `svd_rank_3` has another rank, `dare_linear_all` keeps all. Where numbers are dropped at
random, the mask is a fixed one: kept are the places of which 3 times the number, divided by 5, leaves less than 3.
"""

import os
import pathlib
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "peft"
ADAPTERS, WEIGHTS = ["all-linear", "names", "layers"], [0.7, -0.3, 0.5]
FACTORS = ["linear", "cat", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
PRODUCTS = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]


def mask(like):
    """What is kept of a tensor, instead of numbers at random."""
    places = torch.arange(like.numel()) * 3 % 5 < 3
    return places.to(like.dtype).reshape(like.shape)


def combined(name, kind, **more):
    """The tensors of the three as one."""
    base = AutoModelForCausalLM.from_pretrained(FIXTURES / "base-tied", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, FIXTURES / ADAPTERS[0], adapter_name=ADAPTERS[0])
    for adapter in ADAPTERS[1:]:
        model.load_adapter(FIXTURES / adapter, adapter_name=adapter)
    if kind not in ("linear", "cat", "svd"):
        more.setdefault("density", 0.6)
    model.add_weighted_adapter(ADAPTERS, WEIGHTS, "sum", combination_type=kind, **more)
    tensors = {}
    for module, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "lora_A") or "sum" not in layer.lora_A:
            continue
        assert layer.scaling["sum"] == 1
        a, b = layer.lora_A["sum"].weight.detach(), layer.lora_B["sum"].weight.detach()
        if kind.endswith("svd"):
            tensors[f"{name}.{module}.product"] = b @ a
        else:
            tensors[f"{name}.{module}.lora_A"], tensors[f"{name}.{module}.lora_B"] = a.clone(), b.clone()
    return tensors


def main():
    torch.bernoulli = mask
    tensors = {}
    for kind in FACTORS + PRODUCTS:
        tensors |= combined(kind, kind)
    tensors |= combined("ties_frequency", "ties", majority_sign_method="frequency")
    tensors |= combined("svd_rank_3", "svd", svd_rank=3)
    tensors |= combined("dare_linear_all", "dare_linear", density=1.0)
    save_file({name: tensor.contiguous() for name, tensor in sorted(tensors.items())}, FIXTURES / "combined.safetensors")
    print(f"{len(tensors)} tensors")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
