"""Writes tests/fixtures/layouts.safetensors and tests/fixtures/llama/stored-*: weights as GPTQ's, AWQ's and compressed-tensors' tools store
them, and what those tools make of them.

Run from the repository's root with torch, transformers, peft, safetensors, compressed-tensors 0.20.1 and wheel installed. AutoGPTQ 0.7.1 and
AutoAWQ 0.2.9 do not import beside transformers 5, so the files that pack and unpack are taken out of their packages (which are fetched from
the package index into a temporary folder) and run by themselves.

- GPTQ: packed and made whole by AutoGPTQ's `qlinear_cuda` (columns in any order) and `qlinear_cuda_old` (zeros that wrap). `gptq_v2` is the
  same with stored zeros one more each, as GPTQModel's `convert_gptq_v1_to_v2_format` makes it.
- AWQ: packed here in the order of AutoAWQ's `WQLinear_GEMM` and `WQLinear_GEMV`, made whole by its `dequantize_gemm`.
- compressed-tensors: compressed and decompressed by its own compressors.

layouts.safetensors, for each case `NAME`: the parts as stored under `NAME.`, and `NAME|whole`, in the number type the tool multiplies in.
stored-*: as tiny_llama.py's, the base stored quantised; what transformers and PEFT compute is on the numbers its tool makes of it.
"""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile

import tiny_llama
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

FIXTURES = tiny_llama.FIXTURES.parent


# A wheel for one Python, of which files are taken that every Python runs; and a source package, whose metadata pip builds.
WHEEL = ["--only-binary", ":all:", "--python-version", "3.11", "--platform", "manylinux2014_x86_64"]
SOURCE = ["--no-build-isolation"]


def module(package, options, member, name):
    """A file of a package, loaded without the package around it."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--no-deps", "--quiet", "--disable-pip-version-check", *options]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, "-d", folder, package], check=True)
        (archive,) = pathlib.Path(folder).iterdir()
        opened = zipfile.ZipFile(archive) if archive.suffix == ".whl" else tarfile.open(archive)
        names = opened.namelist() if archive.suffix == ".whl" else opened.getnames()
        (found,) = [name for name in names if name.endswith(member)]
        opened.extract(found, folder)
        spec = importlib.util.spec_from_file_location(name, pathlib.Path(folder) / found)
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
        return loaded


def rounded(weight, bits, group, order=None, symmetric=False):
    """Scales (out, groups) and zeros (out, groups) of weights (out, in), by the least and the largest of each group."""
    out, columns = weight.shape
    groups = -(-columns // group)
    order = torch.arange(columns) // group if order is None else order
    scales, zeros = torch.empty(out, groups), torch.empty(out, groups)
    for k in range(groups):
        own = weight[:, order == k]
        if symmetric:
            scales[:, k] = own.abs().amax(1) / (2 ** (bits - 1) - 0.5)
            zeros[:, k] = 2 ** (bits - 1)
        else:
            least, most = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
            scales[:, k] = (most - least) / (2**bits - 1)
            zeros[:, k] = (-least / scales[:, k]).round().clamp(1, 2**bits - 2)
    return scales.half().float(), zeros


class Gptq:
    """What AutoGPTQ stores and makes of it."""

    def __init__(self):
        self.ordered = module("auto-gptq==0.7.1", WHEEL, "qlinear_cuda.py", "qlinear_cuda")
        self.plain = module("auto-gptq==0.7.1", WHEEL, "qlinear_cuda_old.py", "qlinear_cuda_old")

    def store(self, weight, bits, group, order=None, symmetric=False, v2=False):
        """The parts, and what they stand for (out, in), fp16."""
        out, columns = weight.shape
        size = columns if group == -1 else group
        scales, zeros = rounded(weight, bits, size, order, symmetric)
        own = self.ordered.QuantLinear(bits, group, columns, out, bias=False)
        linear = torch.nn.Linear(columns, out, bias=False)
        # What is out of reach of a group's scale would run over into other codes.
        of_column = torch.arange(columns) // size if order is None else order.long()
        least, most = -zeros * scales, (2**bits - 1 - zeros) * scales
        linear.weight.data = weight.clamp(least[:, of_column], most[:, of_column])
        own.pack(linear, scales.clone(), zeros.clone(), None if order is None else order.int())
        own.scales = own.scales.half()
        parts = {"qweight": own.qweight, "qzeros": own.qzeros, "scales": own.scales, "g_idx": own.g_idx}
        whole = own(torch.eye(columns, dtype=torch.float16)).t()
        if v2:
            one = sum(1 << shift for shift in range(0, 32, bits))
            parts["qzeros"] = ((parts["qzeros"].long() + one) & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)
        return {name: part.contiguous() for name, part in parts.items()}, whole.contiguous()

    def wrapping(self, bits, group, out, columns):
        """Any codes and zeros there may be, the largest stored zero among them."""
        own = self.plain.QuantLinear(bits, group, columns, out, bias=False)
        any_of = lambda shape: torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()
        own.qweight, own.qzeros = any_of(own.qweight.shape), any_of(own.qzeros.shape)
        own.scales = (torch.rand(own.scales.shape) * 0.02).half()
        parts = {"qweight": own.qweight, "qzeros": own.qzeros, "scales": own.scales}
        return parts, own(torch.eye(columns, dtype=torch.float16)).t().contiguous()


class Awq:
    """What AutoAWQ stores and makes of it."""

    def __init__(self):
        self.packing = module("autoawq==0.2.9", SOURCE, "awq/utils/packing_utils.py", "packing_utils")

    def store(self, weight, group, rows=False):
        """The parts in the layout for matrix products or (`rows`) products with a vector, and what they stand for (out, in), fp16."""
        out, columns = weight.shape
        size = columns if group == -1 else group
        scales, zeros = rounded(weight, 4, size)
        of_column = torch.arange(columns) // size
        codes = (weight / scales[:, of_column] + zeros[:, of_column]).round().clamp(0, 15).int()  # (out, in)
        zeros = zeros.int()

        def packed(numbers, order):
            eights = numbers.reshape(numbers.shape[0], -1, 8)[..., order].long()
            words = (eights << (4 * torch.arange(8))).sum(-1)
            return words.to(torch.uint32).view(torch.int32)

        gemm = {
            "qweight": packed(codes.t(), self.packing.AWQ_ORDER),
            "qzeros": packed(zeros.t(), self.packing.AWQ_ORDER),
            "scales": scales.t().half().contiguous(),
        }
        whole = self.packing.dequantize_gemm(gemm["qweight"], gemm["qzeros"], gemm["scales"], 4, size).t().contiguous()
        if not rows:
            return gemm, whole
        together = {32: 4, 64: 2}.get(size, 1)
        words = -(-(-(-zeros.shape[1] // 8)) // together) * together
        filled = lambda numbers: torch.nn.functional.pad(numbers, (0, 8 * words - numbers.shape[1]))
        return {
            "qweight": packed(codes, list(range(8))),
            "qzeros": packed(filled(zeros), list(range(8))),
            "scales": filled(scales).half(),
        }, whole


def compress(weight, format, **weights):
    """What compressed-tensors stores, and what it makes of that (out, in)."""
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    args = scheme.weights
    out, columns = weight.shape
    if args.strategy == "tensor":
        blocks = weight.reshape(1, -1)
        shape = (1,)
    elif args.strategy == "channel":
        blocks, shape = weight, (out, 1)
    elif args.strategy == "group":
        blocks, shape = weight.reshape(-1, args.group_size), (out, columns // args.group_size)
    else:
        high, wide = args.block_structure
        down, across = -(-out // high), -(-columns // wide)
        whole = torch.nn.functional.pad(weight, (0, across * wide - columns, 0, down * high - out))
        blocks = whole.reshape(down, high, across, wide).transpose(1, 2).reshape(down * across, -1)
        shape = (down, across)
    scale, zero = calculate_qparams(blocks.amin(1), blocks.amax(1), args)
    state = {"weight": weight, "weight_scale": scale.reshape(shape)}
    if not args.symmetric:
        state["weight_zero_point"] = zero.reshape(shape)
    compressor = BaseCompressor.get_value_from_registry(format)
    stored = compressor.compress(state, scheme)
    whole = compressor.decompress(dict(stored), scheme)["weight"]
    return {name: part.contiguous() for name, part in stored.items()}, whole.contiguous()


def cases(gptq, awq):
    """Every layout, by name: parts and numbers."""
    torch.manual_seed(17)
    weight = torch.randn(64, 128) * (0.02 + torch.rand(64, 1))
    drawn = lambda columns, groups: torch.arange(columns)[torch.randperm(columns)] % groups
    found = {
        f"gptq.{bits}.{group}": gptq.store(weight, bits, group)
        for bits, group in [(4, 32), (4, 128), (4, -1), (8, 64), (3, 32), (2, 32)]
    }
    found["gptq.4.32.order"] = gptq.store(weight, 4, 32, drawn(128, 4))
    found["gptq.8.32.order"] = gptq.store(weight, 8, 32, drawn(128, 4))
    found["gptq.3.64.order"] = gptq.store(weight, 3, 64, drawn(128, 2))
    found["gptq.4.64.sym"] = gptq.store(weight, 4, 64, symmetric=True)
    found["gptq_v2.4.64"] = gptq.store(weight, 4, 64, v2=True)
    found["gptq_v2.8.64"] = gptq.store(weight, 8, 64, v2=True)
    for bits in (2, 4, 8):
        found[f"gptq.{bits}.32.any"] = gptq.wrapping(bits, 32, 64, 96)
    for group in (32, 64, 128, -1):
        found[f"awq.gemm.{group}"] = awq.store(weight, group)
        found[f"awq.gemv.{group}"] = awq.store(weight, group, rows=True)

    int4 = {"num_bits": 4, "type": "int"}
    int8 = {"num_bits": 8, "type": "int"}
    fp8 = {"num_bits": 8, "type": "float"}
    group = {"strategy": "group", "group_size": 32}
    block = {"strategy": "block", "block_structure": [40, 48]}
    odd = torch.randn(56, 76).bfloat16()
    for name, tensor, format, how in [
        ("int4.group", weight.bfloat16(), "pack-quantized", int4 | group),
        ("int4.group.zeros", weight.bfloat16(), "pack-quantized", int4 | group | {"symmetric": False}),
        ("int4.channel.zeros", odd, "pack-quantized", int4 | {"strategy": "channel", "symmetric": False}),
        ("int4.tensor", odd, "pack-quantized", int4 | {"strategy": "tensor"}),
        ("int2.group", weight, "pack-quantized", int4 | group | {"num_bits": 2}),
        ("int8.packed.group", weight.half(), "pack-quantized", int8 | group),
        ("int8.packed.channel.zeros", odd, "pack-quantized", int8 | {"strategy": "channel", "symmetric": False}),
        ("int8.channel", odd, "int-quantized", int8 | {"strategy": "channel"}),
        ("int8.channel.zeros", odd.float(), "naive-quantized", int8 | {"strategy": "channel", "symmetric": False}),
        ("int8.tensor", odd.half(), "int-quantized", int8 | {"strategy": "tensor"}),
        ("int8.group", weight, "naive-quantized", int8 | group),
        ("int8.block", odd, "naive-quantized", int8 | block),
        ("int4.naive.channel", odd, "naive-quantized", int4 | {"strategy": "channel"}),
        ("fp8.channel", odd, "float-quantized", fp8 | {"strategy": "channel"}),
        ("fp8.tensor", odd.float(), "naive-quantized", fp8 | {"strategy": "tensor"}),
        ("fp8.group", weight.half(), "naive-quantized", fp8 | group),
        ("fp8.block", odd, "float-quantized", fp8 | block),
    ]:
        found[f"{format}.{name}"] = compress(tensor, format, **how)
    return found


def llamas(gptq, awq):
    """Of each small model: its config, how a module's weight is stored, and which are left."""
    drawn = lambda weight: torch.arange(weight.shape[1])[torch.randperm(weight.shape[1])] // 32
    biased = lambda parts, weight: parts | {"bias": torch.zeros(weight.shape[0], dtype=torch.float16)}

    def by_gptq(weight):
        parts, whole = gptq.store(weight, 4, 32, drawn(weight))
        return biased(parts, weight), whole  # AutoGPTQ gives every linear a bias

    def by_blocks(weight):
        parts, whole = compress(weight, "naive-quantized", num_bits=8, type="float", strategy="block", block_structure=[48, 40])
        return {"weight": parts["weight"], "weight_scale_inv": parts["weight_scale"].float()}, whole

    int4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
    groups = lambda weights, inputs=None: {
        "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    }
    dynamic = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    return {
        "stored-gptq": (
            {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False, "checkpoint_format": "gptq"},
            by_gptq,
            ["lm_head"],
        ),
        "stored-awq": (
            {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None},
            lambda weight: awq.store(weight, 32),
            ["lm_head"],
        ),
        "stored-int4": (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "quantization_status": "compressed",
                "config_groups": groups(int4),
                "ignore": ["lm_head", "re:.*down_proj$"],
            },
            lambda weight: compress(weight.bfloat16(), "pack-quantized", **int4),
            ["lm_head", "down_proj"],
        ),
        "stored-fp8-rows": (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "quantization_status": "compressed",
                "config_groups": groups(fp8, dynamic),
                "ignore": ["lm_head"],
            },
            lambda weight: compress(weight.bfloat16(), "float-quantized", **fp8),
            ["lm_head"],
        ),
        "stored-fp8-blocks": (
            {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [48, 40]},
            by_blocks,
            ["lm_head"],
        ),
    }


def make(name, config, store, left, seed):
    """One model with its adapter and references."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    folder = tiny_llama.FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    widths = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    options = tiny_llama.COMMON | widths | {"tie_word_embeddings": False}
    model = LlamaForCausalLM(LlamaConfig(**options, attn_implementation="eager")).float()
    tiny_llama.randomise(model, generator)

    stored, numbers = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not path.endswith(tuple(left)):
            parts, whole = store(module.weight.detach())
            stored |= {f"{path}.{part}": tensor for part, tensor in parts.items()}
            module.weight.data = whole.float()
            numbers[path] = whole
        else:
            stored |= {f"{path}.{part}": tensor.detach() for part, tensor in module.named_parameters(recurse=False)}
    save_file({key: part.contiguous() for key, part in stored.items()}, folder / "model.safetensors", {"format": "pt"})
    written = json.loads(model.config.to_json_string()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

    ids, offsets, mask = tiny_llama.documents([19, 7, 29], generator)
    with torch.no_grad():
        base = tiny_llama.forward(model, ids, offsets)
    peft = tiny_llama.adapted(model, name, generator)
    logits = tiny_llama.forward(peft, ids, offsets)
    loss = tiny_llama.mean_loss(logits, ids, offsets, mask)
    loss.backward()
    reference = {"ids": ids, "offsets": offsets, "mask": mask, "base_logits": base, "logits": logits.detach()}
    reference |= {"loss": loss.detach().reshape(1)} | {f"grad.{k}": v for k, v in tiny_llama.gradients_of(peft).items()}
    if name == "stored-gptq":
        reference |= tiny_llama.train(peft, generator)
    save_file({k: v.contiguous() for k, v in reference.items()}, folder / "reference.safetensors")
    print(f"{name}: loss {loss.item():.4f}")
    return numbers


def loads(name, numbers):
    """That transformers loads what was written, where the tool's own quantiser runs on the CPU, as the same numbers."""
    # In another type than the scales' it multiplies in that.
    model = LlamaForCausalLM.from_pretrained(tiny_llama.FIXTURES / name, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        model(input_ids=torch.arange(1, 9).unsqueeze(0))  # made whole with the first forward
    for path, whole in numbers.items():
        found = model.get_submodule(path).weight
        assert found.dtype == whole.dtype and torch.equal(found, whole), f"{name}: {path}"


def main():
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gptq, awq = Gptq(), Awq()
    tensors = {}
    for name, (parts, whole) in cases(gptq, awq).items():
        tensors |= {f"{name}|{part}": tensor for part, tensor in parts.items()} | {f"{name}|whole": whole}
    save_file(tensors, FIXTURES / "layouts.safetensors")
    for seed, (name, (config, store, left)) in enumerate(llamas(gptq, awq).items(), start=201):
        numbers = make(name, config, store, left, seed)
        if config["quant_method"] == "compressed-tensors":
            loads(name, numbers)


if __name__ == "__main__":
    main()
