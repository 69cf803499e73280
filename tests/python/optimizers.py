"""Writes tests/fixtures/optimizers.safetensors: where each reference optimizer ends after some steps, and with what state.

Run from the repository's root with torch, transformers, peft, safetensors, bitsandbytes and schedulefree installed.

Parameters and gradients are whole-number arithmetic and one division, so that the tests make the same bits without storing
them: `drawn(shape, seed)`. The learning rate of every step is another one (`RATES`), the first is 0.

The references: `adamw_8bit` is bitsandbytes' AdamW8bit and its CPU update, `lion` is bitsandbytes' Lion, `sgd` and `muon` are
torch's, `adafactor` is transformers' with the settings its Trainer gives it, `schedule_free_adamw` is the package schedulefree,
`loraplus` is PEFT's `create_loraplus_optimizer` over torch's AdamW. A 3-D tensor is to Muon a list of matrices.

bitsandbytes quantises float32 on the CPU by a table of 65536 values, which makes of 0 in the unsigned map 1.5e-5; its other
backends, and its CPU one when it is given float64, take the nearest code. The latter is what is asked here.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import bitsandbytes as bnb
import schedulefree
import torch
from bitsandbytes.backends.cpu import ops as cpu_backend
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from safetensors.torch import save_file
from transformers.optimization import Adafactor

RATES = [0.0, 0.01, 0.02, 0.015, 0.005, 0.002]
SHAPES = {"matrix": (5, 7), "vector": (33,), "wide": (6, 40), "tall": (40, 6), "stacked": (3, 9, 14)}
# Below, at and above the 4096 numbers from which a state has 8 bits; `odd` and `stacked` do not end with a block of 256.
LARGE = {"small": (5, 7), "almost": (4095,), "exact": (64, 64), "odd": (17, 271), "stacked": (3, 40, 40)}
DECAY = 0.1
NORM = 0.7

Tensors = dict[str, torch.Tensor]


def drawn(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Numbers within 1, most of them small."""
    whole = (torch.arange(torch.Size(shape).numel(), dtype=torch.int64) * 7919 + seed * 104729) % 2003 - 1001
    value = whole.to(torch.float32) / 1001
    return (value * value * value).reshape(shape)


def start(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    return {name: torch.nn.Parameter(drawn(shape, index)) for index, (name, shape) in enumerate(shapes.items())}


def train(parameters: Tensors, optimizer: torch.optim.Optimizer, norm: float = NORM) -> None:
    """Steps; `optimizer`'s own learning rates are factors of `RATES`."""
    factors = [group["lr"] for group in optimizer.param_groups]
    for step, rate in enumerate(RATES):
        for index, parameter in enumerate(parameters.values()):
            parameter.grad = drawn(tuple(parameter.shape), 100 * (step + 1) + index)
        if norm > 0:
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), norm)
        for group, factor in zip(optimizer.param_groups, factors, strict=True):
            group["lr"] = rate * factor
        optimizer.step()


def outcome(parameters: Tensors, optimizer: torch.optim.Optimizer, states: list[str]) -> Tensors:
    """The parameters and those parts of the state that each has."""
    found = {}
    for name, parameter in parameters.items():
        found[name] = parameter.detach().clone()
        state = optimizer.state[parameter]
        found |= {f"{name}.{key}": state[key].clone() for key in states if state.get(key) is not None}
    return found


def nearest(values: torch.Tensor, code: torch.Tensor, absmax: torch.Tensor, out: torch.Tensor, block: int) -> None:
    codes, largest = torch.ops.bitsandbytes.quantize_blockwise(values.double(), code, block)
    out.copy_(codes)
    absmax.copy_(largest)


def adamw_8bit() -> Tensors:
    parameters = start(LARGE)
    cpu_backend._quant_blockwise_fp32_direct = nearest
    optimizer = bnb.optim.AdamW8bit(parameters.values(), lr=1.0, betas=(0.9, 0.99), weight_decay=DECAY)
    # Without clipping: gradients of the same bits, so that codes can be compared for equality.
    train(parameters, optimizer, norm=0)
    return outcome(parameters, optimizer, ["state1", "state2", "absmax1", "absmax2"])


def quantised(signed: bool) -> Tensors:
    """Zeros, tiny numbers and others, in blocks of 256 and a part of one."""
    tiny, wide = drawn((300,), 1) * 1e-30, drawn((999,), 2) ** 3 * 40
    values = torch.cat([torch.zeros(256), tiny, wide])
    values = values if signed else values.abs()
    code = bnb.functional.create_dynamic_map(signed=signed)
    codes, absmax = torch.empty(len(values), dtype=torch.uint8), torch.empty(-(-len(values) // 256))
    nearest(values, code, absmax, codes, 256)
    codes[:256] = 0  # of zeros it says so where it is given float32
    back = torch.ops.bitsandbytes.dequantize_blockwise(codes, absmax, code, 256, torch.float32)
    return {"map": code, "values": values, "codes": codes, "absmax": absmax, "back": back}


def adafactor() -> Tensors:
    parameters = start(SHAPES)
    optimizer = Adafactor(
        parameters.values(), lr=1.0, scale_parameter=False, relative_step=False, weight_decay=DECAY
    )
    train(parameters, optimizer)
    return outcome(parameters, optimizer, ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"])


def lion() -> Tensors:
    parameters = start(SHAPES)
    optimizer = bnb.optim.Lion(parameters.values(), lr=1.0, betas=(0.9, 0.99), weight_decay=DECAY)
    train(parameters, optimizer)
    return outcome(parameters, optimizer, ["state1"])


def sgd(momentum: float, nesterov: bool) -> Tensors:
    parameters = start(SHAPES)
    optimizer = torch.optim.SGD(
        parameters.values(), lr=1.0, momentum=momentum, nesterov=nesterov, weight_decay=DECAY
    )
    train(parameters, optimizer)
    return outcome(parameters, optimizer, ["momentum_buffer"])


def schedule_free_adamw() -> Tensors:
    """`x.*` is the average, what is evaluated and saved."""
    parameters = start(SHAPES)
    optimizer = schedulefree.AdamWScheduleFree(
        parameters.values(), lr=1.0, betas=(0.9, 0.99), weight_decay=DECAY, foreach=False
    )
    optimizer.train()
    train(parameters, optimizer)
    found = outcome(parameters, optimizer, ["z", "exp_avg_sq"])
    found["weight_sum"] = torch.tensor(optimizer.param_groups[0]["weight_sum"], dtype=torch.float64)
    optimizer.eval()
    return found | {f"x.{name}": parameter.detach().clone() for name, parameter in parameters.items()}


def muon(adjust: str, nesterov: bool) -> Tensors:
    """What has two dimensions or three; the others are AdamW's."""
    parameters = start(SHAPES)
    matrices, owners = [], {}
    for name, parameter in parameters.items():
        if parameter.dim() == 1:
            continue
        parts = list(parameter.detach()) if parameter.dim() == 3 else [parameter.detach()]
        owners[name] = [torch.nn.Parameter(part.clone()) for part in parts]
        matrices += owners[name]
    first = torch.optim.Muon(
        matrices, lr=1.0, weight_decay=DECAY, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust
    )
    rest = [parameter for parameter in parameters.values() if parameter.dim() == 1]
    second = torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=DECAY)
    for step, rate in enumerate(RATES):
        for index, parameter in enumerate(parameters.values()):
            parameter.grad = drawn(tuple(parameter.shape), 100 * (step + 1) + index)
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), NORM)
        for name, parts in owners.items():
            grad = parameters[name].grad
            for part, own in zip(parts, grad if grad.dim() == 3 else [grad], strict=True):
                part.grad = own.clone()
        for optimizer in (first, second):
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    found = outcome({name: p for name, p in parameters.items() if p.dim() == 1}, second, ["exp_avg", "exp_avg_sq"])
    for name, parts in owners.items():
        joined = torch.stack if parameters[name].dim() == 3 else torch.cat
        found[name] = joined([part.detach() for part in parts])
        found[f"{name}.momentum_buffer"] = joined([first.state[part]["momentum_buffer"] for part in parts])
    return found


def loraplus() -> Tensors:
    """`first.a` is the A of the linear `first`; in the order of the model, A before B."""
    layers = torch.nn.ModuleDict({"first": torch.nn.Linear(7, 9), "second": torch.nn.Linear(9, 5)})
    model = get_peft_model(layers, LoraConfig(r=3, target_modules=["first", "second"]))
    parameters = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, matrix = ("first" if ".first." in name else "second"), ("a" if "lora_A" in name else "b")
            parameter.data = drawn(tuple(parameter.shape), len(parameters))
            parameters[f"{layer}.{matrix}"] = parameter
    assert list(parameters) == ["first.a", "first.b", "second.a", "second.b"]
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=16.0, loraplus_weight_decay=DECAY
    )
    train(parameters, optimizer)
    return outcome(parameters, optimizer, ["exp_avg", "exp_avg_sq"])


def main() -> None:
    torch.use_deterministic_algorithms(True)
    cases = {
        "adamw_8bit": adamw_8bit(),
        "adafactor": adafactor(),
        "lion": lion(),
        "sgd.plain": sgd(0.0, False),
        "sgd.momentum": sgd(0.9, False),
        "sgd.nesterov": sgd(0.9, True),
        "schedule_free_adamw": schedule_free_adamw(),
        "muon.original": muon("original", True),
        "muon.match_rms_adamw": muon("match_rms_adamw", False),
        "loraplus": loraplus(),
        "signed": quantised(True),
        "unsigned": quantised(False),
    }
    tensors = {f"{case}/{name}": tensor.contiguous() for case, found in cases.items() for name, tensor in found.items()}
    save_file(tensors, "tests/fixtures/optimizers.safetensors")


if __name__ == "__main__":
    main()
