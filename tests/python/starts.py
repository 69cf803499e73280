"""Writes tests/fixtures/llama/starts.safetensors: adapters that start from the weights, as PEFT 0.21.2 makes and trains them.

On the model and the batches of `grouped-tied` (`tiny_llama.py`), r 4 and lora_alpha 6, for pissa and olora:

    <start>.losses (20)              of training as `tiny_llama.py` does
    <start>.update.<module> (out, in)    what the trained adapter comes to on the weight as it was, `s (B A - B0 A0)`

the same on bases quantised by bitsandbytes, those of `qlora-nf4` (`qlora.py`):

    olora-nf4.*    PEFT's own, which starts from the numbers that the quantised base stands for
    pissa-nf4.*    by way of a model that pissa is taken off first: PEFT takes it off plain numbers only; .base. is what is left
    olora-int8.base.<module> (out, in)    what is left after olora, in eight bits; PEFT has no pissa there, nor is it trained:
                                          bitsandbytes quantises what goes into such linears, too

(of two modules),

and of LoftQ, which PEFT computes on a GPU only, its function run on the CPU with lora_alpha equal to r, for one weight:

    loftq.weight (out, in)
    loftq.product (out, in)    B A of rank 4: what NF4 in blocks of 64 loses
    loftq.base (out, in)       what the quantised weight stands for
    loftq.5.*                  the same of five iterations
"""

import inspect
import tempfile

import bitsandbytes.functional as bnb
import qlora
import tiny_llama
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import loftq_utils
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM

MODEL = tiny_llama.FIXTURES / "grouped-tied"
QUANTISED = tiny_llama.FIXTURES / "qlora-nf4"
RANK, ALPHA = 4, 6
# Of the quantised model, whose weights are larger.
SHOWN = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def config(start):
    """A start on every linear."""
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM")


def plain(folder):
    """The model of a folder."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def in_nf4(folder):
    """The model of a folder, quantised while it is loaded."""
    return qlora.quantised(folder, qlora.MODELS["qlora-nf4"][1])


def products(peft):
    """`s B A` by module."""
    return {
        name.removeprefix("base_model.model."): ALPHA / RANK * module.lora_B.default.weight @ module.lora_A.default.weight
        for name, module in peft.named_modules()
        if hasattr(module, "lora_A")
    }


def trained(peft, folder, name):
    """The losses of a run on the folder's batches, and what the adapter comes to."""
    before = {module: product.detach().clone() for module, product in products(peft).items()}
    recorded = load_file(folder / "reference.safetensors")
    batches = [tuple(recorded[f"batch.{k}.{what}"] for what in ("ids", "offsets", "mask")) for k in range(tiny_llama.BATCHES)]
    losses = tiny_llama.steps(peft, batches)[0]
    updates = {f"{name}.update.{module}": (product - before[module]).detach() for module, product in products(peft).items()}
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return {f"{name}.losses": torch.tensor(losses)} | updates


def pissa_in_nf4():
    """What is left of the base saved first, and quantised then, as the method's makers do; and what that stands for."""
    peft = get_peft_model(plain(QUANTISED), config("pissa"))
    with tempfile.TemporaryDirectory() as place:
        peft.peft_config["default"].init_lora_weights = True  # or loading would take it off again
        peft.save_pretrained(f"{place}/adapter")
        peft.unload().save_pretrained(f"{place}/left")
        left = in_nf4(f"{place}/left")
        modules = {name: left.get_submodule(name) for name in SHOWN}
        base = {f"pissa-nf4.base.{n}": bnb.dequantize_4bit(m.weight.data, m.weight.quant_state) for n, m in modules.items()}
        return PeftModel.from_pretrained(left, f"{place}/adapter", is_trainable=True), base


def olora_in_int8():
    """What is left of each weight."""
    model = LlamaForCausalLM.from_pretrained(
        QUANTISED, dtype=torch.float32, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    peft = get_peft_model(model, config("olora"))
    left = {}
    for name, module in peft.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            # Another start's: bitsandbytes quantises a weight anew when it is moved, and keeps it so.
            codes, scales = (weight.CB, weight.SCB) if weight.CB is not None else (weight.data, weight.SCB)
            left[f"olora-int8.base.{name.removeprefix('base_model.model.')}"] = bnb.int8_vectorwise_dequant(codes, scales)
    return left


def loftq():
    """PEFT's pairs for a weight, made on the CPU."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    place = dict(vars(loftq_utils))
    exec(source, place)
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(5))
    tensors = {"loftq.weight": weight}
    for iterations, name in [(1, "loftq"), (5, "loftq.5")]:
        base, a, b = place["loftq_init"](weight, num_bits=4, reduced_rank=RANK, num_iter=iterations)
        tensors |= {f"{name}.product": b @ a, f"{name}.base": base}
    return tensors


def main():
    """Writes the file."""
    torch.set_num_threads(1)
    tensors = loftq()
    for start in ["pissa", "olora"]:
        torch.manual_seed(3)
        tensors |= trained(get_peft_model(plain(MODEL), config(start)), MODEL, start)
    quantised = trained(get_peft_model(in_nf4(QUANTISED), config("olora")), QUANTISED, "olora-nf4")
    peft, base = pissa_in_nf4()
    quantised |= base | trained(peft, QUANTISED, "pissa-nf4") | olora_in_int8()
    tensors |= {key: tensor for key, tensor in quantised.items() if "model." not in key or any(key.endswith(name) for name in SHOWN)}
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tiny_llama.FIXTURES / "starts.safetensors")


if __name__ == "__main__":
    main()
