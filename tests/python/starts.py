"""Writes tests/fixtures/llama/starts.safetensors: adapters that start from the weights, as PEFT 0.21.2 makes and trains them.

On the model and the batches of `grouped-tied` (`tiny_llama.py`), r 4 and lora_alpha 6, for pissa and olora:

    <start>.losses (20)              of training as `tiny_llama.py` does
    <start>.update.<module> (out, in)    what the trained adapter comes to on the weight as it was, `s (B A - B0 A0)`

and of LoftQ, which PEFT computes on a GPU only, its function run on the CPU with lora_alpha equal to r, for one weight:

    loftq.weight (out, in)    loftq.product (out, in)    B A of rank 4, what NF4 in blocks of 64 loses
"""

import inspect

import tiny_llama
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

MODEL = tiny_llama.FIXTURES / "grouped-tied"
RANK, ALPHA = 4, 6


def products(peft):
    """`s B A` by module."""
    return {
        name.removeprefix("base_model.model."): ALPHA / RANK * module.lora_B.default.weight @ module.lora_A.default.weight
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A")
    }


def trained(start):
    """The losses of a run, and what the adapter comes to."""
    model = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    before = {name: product.detach().clone() for name, product in products(peft).items()}
    recorded = load_file(MODEL / "reference.safetensors")
    batches = [tuple(recorded[f"batch.{k}.{what}"] for what in ("ids", "offsets", "mask")) for k in range(tiny_llama.BATCHES)]
    losses = tiny_llama.steps(peft, batches)[0]
    updates = {f"{start}.update.{name}": (product - before[name]).detach() for name, product in products(peft).items()}
    print(f"{start}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return {f"{start}.losses": torch.tensor(losses)} | updates


def loftq():
    """PEFT's pair for a weight, made on the CPU."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    place = dict(vars(loftq_utils))
    exec(source, place)
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(5))
    _, a, b = place["loftq_init"](weight, num_bits=4, reduced_rank=RANK, num_iter=1)
    return {"loftq.weight": weight, "loftq.product": b @ a}


def main():
    """Writes the file."""
    torch.set_num_threads(1)
    tensors = loftq()
    for start in ["pissa", "olora"]:
        torch.manual_seed(3)
        tensors |= trained(start)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tiny_llama.FIXTURES / "starts.safetensors")


if __name__ == "__main__":
    main()
