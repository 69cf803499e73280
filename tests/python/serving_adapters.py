"""What `engraft export` writes, loaded by the programs it is written for, and `engraft combine` beside PEFT.

    python tests/python/serving_adapters.py --engraft target/release/engraft

On random models of two families (a dense one, and a mixture of experts) with adapters that PEFT has saved: plain, rank-stabilised, with
ranks and scales by pattern, at some layers only. Checked, on full tensors, in fp32:

 1. PEFT loads every adapter target's folder and gives engraft's logits of the adapter as it was;
 2. what a reader makes of it that knows nothing but `r` and `lora_alpha` is the same update;
 3. transformers loads the merged models, and an adapter's folder by itself;
 4. vLLM's own configuration and parser take the folder, where `vllm` can be imported;
 5. mlx-lm's own loader does, and gives the same logits, where `mlx` can be imported;
 6. `engraft combine` is PEFT's `add_weighted_adapter`, for every kind.

What could not be run is said, and is no failure.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

LOGITS = 1e-4  # of the largest logit
UPDATE = 1e-5  # of the largest number of an update
IDS = [5, 80, 33, 7, 61, 2, 19]
SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "decoder_sparse_step": 1}
MODELS = {
    "dense": LlamaConfig(**SMALL, num_hidden_layers=3),
    "experts": Qwen3MoeConfig(**SMALL, **EXPERTS, num_hidden_layers=2),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "plain": ("dense", {"target_modules": LINEARS}),
    "rslora": ("dense", {"target_modules": LINEARS, "use_rslora": True}),
    "patterns": (
        "dense",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {"down_proj": 3.5},
            "use_rslora": True,
        },
    ),
    "some-layers": ("dense", {"target_modules": ["q_proj", "gate_proj"], "layers_to_transform": [0, 2]}),
    "attention": ("experts", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "use_rslora": True}),
    "of-experts": (
        "experts",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "rank_pattern": {".*mlp.experts.gate_up_proj": 8},
            "alpha_pattern": {".*mlp.experts.gate_up_proj": 16},
        },
    ),
}
REFUSED = {"of-experts": ["sglang", "tgi"]}

failures, not_run = [], []


def check(what, difference, bound):
    """Prints and remembers one comparison."""
    good = difference <= bound
    print(f"{'ok  ' if good else 'FAIL'}  {what}: {difference:.2e} (bound {bound:.0e})", flush=True)
    if not good:
        failures.append(what)


def relative(ours, theirs):
    """Largest difference over the largest value; shapes must agree."""
    assert ours.shape == theirs.shape, f"shapes differ: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12)).item()


class Bench:
    """A folder with models and adapters, and the executable."""

    def __init__(self, engraft, folder):
        self.engraft, self.folder = engraft, pathlib.Path(folder)
        for name, config in MODELS.items():
            torch.manual_seed(len(name))
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1) + (parameter.dim() == 1))
            model.save_pretrained(self.folder / name)
        for name, (base, wishes) in ADAPTERS.items():
            self.adapter(name, base, wishes)

    def base(self, name):
        """A model of the folder."""
        return AutoModelForCausalLM.from_pretrained(self.folder / name, dtype=torch.float32, attn_implementation="eager").eval()

    def adapter(self, name, base, wishes, seed=0):
        """An adapter as PEFT saves it, with a B that is not zero."""
        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | wishes)
        model = get_peft_model(self.base(base), config)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(self.folder / name)

    def run(self, *arguments):
        """Runs the executable."""
        result = subprocess.run([self.engraft, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True)
        return result.returncode, result.stdout, result.stderr

    def succeed(self, *arguments):
        """Runs what must succeed."""
        code, out, errors = self.run(*arguments)
        assert code == 0, f"{arguments} ended with {code}:\n{errors}"
        return out

    def logits(self, *model):
        """engraft's logits."""
        out = self.folder / "logits.safetensors"
        self.succeed("logits", *model, "--dtype", "fp32", "--ids", ",".join(map(str, IDS)), "--out", out)
        return load_file(out)["logits"]


def theirs(model):
    """transformers' logits."""
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].float()


def targets(bench):
    """Checks 1 to 5."""
    for name, (base, _) in ADAPTERS.items():
        expected = bench.logits("--model", base, "--adapter", name)
        plain = theirs(bench.base(base))
        check(f"{name}: engraft is PEFT", relative(expected, theirs(PeftModel.from_pretrained(bench.base(base), bench.folder / name))), LOGITS)
        assert relative(expected, plain) > 100 * LOGITS, "the adapter changes nothing"
        for target in ["peft", "transformers", "vllm", "sglang", "tgi", "mlx"]:
            out = f"{name}-{target}"
            arguments = ["export", name, "--target", target, "--model", base, "--out", out]
            if target in REFUSED.get(name, []):
                code, _, errors = bench.run(*arguments)
                refused = code == 5 and "--merge" in errors and not (bench.folder / out).exists()
                check(f"{name}: {target} refuses it and names the way out", 0.0 if refused else 1.0, 0.5)
                continue
            bench.succeed(*arguments)
            if target == "mlx":
                in_mlx(bench, base, out, expected)
                continue
            loaded = PeftModel.from_pretrained(bench.base(base), bench.folder / out)
            check(f"{name}: PEFT, of what {target} loads", relative(theirs(loaded), expected), LOGITS)
            if target in ("vllm", "sglang", "tgi"):
                reader(bench, name, base, out, stabilised=target != "sglang")
            if target == "vllm":
                in_vllm(bench, out)
        merged = f"{name}-merged"
        bench.succeed("export", name, "--target", "transformers", "--merge", "--model", base, "--out", merged)
        check(f"{name}: transformers, merged", relative(theirs(bench.base(merged)), expected), LOGITS)
    # An adapter's folder, which names its base.
    name = "rslora-transformers"
    config = bench.folder / name / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(json.dumps(said | {"base_model_name_or_path": str(bench.folder / "dense")}))
    model = AutoModelForCausalLM.from_pretrained(bench.folder / name, dtype=torch.float32).eval()
    check("transformers, of an adapter's folder", relative(theirs(model), bench.logits("--model", "dense", "--adapter", "rslora")), LOGITS)


def reader(bench, name, base, out, stabilised):
    """A reader that knows `r`, `lora_alpha` and perhaps `use_rslora`, and no patterns: is the update the same?"""
    said = json.loads((bench.folder / out / "adapter_config.json").read_text())
    root = said["r"] ** 0.5 if stabilised and said.get("use_rslora") else said["r"]
    stored = load_file(bench.folder / out / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(bench.base(base), bench.folder / name)
    worst, compared = 0.0, 0
    for module, layer in model.base_model.model.named_modules():
        key = f"base_model.model.{module}.lora_A.weight"
        if key in stored and hasattr(layer, "get_delta_weight") and not hasattr(layer, "parameter_name"):
            found = said["lora_alpha"] / root * stored[key.replace("lora_A", "lora_B")] @ stored[key]
            worst, compared = max(worst, relative(found, layer.get_delta_weight("default").detach())), compared + 1
    assert compared > 0
    check(f"{name}: {compared} updates as a plain reader of {out} makes them", worst, UPDATE)


def in_vllm(bench, out):
    """vLLM's configuration of an adapter, and what its parser makes of the keys."""
    try:
        from vllm.lora.peft_helper import PEFTHelper
        from vllm.lora.utils import parse_fine_tuned_lora_name
    except ImportError as error:
        if not any("vLLM" in line for line in not_run):
            not_run.append(f"vLLM's parser: {error}")
        return
    PEFTHelper.from_local_dir(str(bench.folder / out), max_position_embeddings=64)
    for key in load_file(bench.folder / out / "adapter_model.safetensors"):
        parse_fine_tuned_lora_name(key)
    check(f"{out}: vLLM's parser takes it", 0.0, 0.5)


def in_mlx(bench, base, out, expected):
    """mlx-lm's own loader."""
    try:
        import mlx.core as mx
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model
    except (ImportError, OSError) as error:
        if not any("mlx" in line for line in not_run):
            not_run.append(f"mlx-lm: {error}")
        return
    mx.set_default_device(mx.cpu)
    # It reads configs as they are published, which transformers 5 spells anew when it saves one.
    published = bench.folder / f"{base}-published"
    if not published.exists():
        shutil.copytree(bench.folder / base, published)
        config = json.loads((published / "config.json").read_text())
        theta = config.get("rope_parameters", {}).get("rope_theta", 10000.0)
        config |= {"num_experts": EXPERTS["num_experts"], "rope_theta": theta}
        (published / "config.json").write_text(json.dumps(config))
    model, _ = load_model(published)
    model = load_adapters(model, str(bench.folder / out))
    model.eval()
    logits = torch.tensor(model(mx.array([IDS]))[0].astype(mx.float32).tolist())
    check(f"{out}: mlx-lm", relative(logits, expected), 10 * LOGITS)


def combined(bench):
    """Check 6."""
    names, weights = ["plain", "other", "third"], [0.7, -0.3, 0.5]
    bench.adapter("other", "dense", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, seed=1)
    bench.adapter("third", "dense", {"target_modules": LINEARS, "lora_alpha": 3}, seed=2)
    kinds = ["linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd"]
    for kind in kinds + ["magnitude_prune", "magnitude_prune_svd"]:
        # What is dropped at random can only agree where nothing is.
        density = None if kind in ("linear", "cat", "svd") else 1.0 if kind.startswith("dare") else 0.55
        for majority in ["total", "frequency"] if "ties" in kind else ["total"]:
            model = PeftModel.from_pretrained(bench.base("dense"), bench.folder / names[0], adapter_name=names[0])
            for name in names[1:]:
                model.load_adapter(bench.folder / name, adapter_name=name)
            model.add_weighted_adapter(
                names, weights, "sum", combination_type=kind, density=density, majority_sign_method=majority
            )
            out = f"sum-{kind}-{majority}"
            more = [] if density is None else ["--density", density]
            typed = ",".join(map(str, weights))
            bench.succeed("combine", *names, "--by", kind, f"--weights={typed}", "--majority-sign", majority, *more, "--out", out)
            stored = load_file(bench.folder / out / "adapter_model.safetensors")
            worst = 0.0
            for module, layer in model.base_model.model.named_modules():
                if hasattr(layer, "lora_A") and "sum" in layer.lora_A:
                    key = f"base_model.model.{module}.lora_A.weight"
                    found = stored[key.replace("lora_A", "lora_B")] @ stored[key]
                    theirs_is = layer.lora_B["sum"].weight.detach() @ layer.lora_A["sum"].weight.detach()
                    worst = max(worst, relative(found, theirs_is))
            check(f"combine --by {kind} --majority-sign {majority}", worst, UPDATE)


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--engraft", required=True)
    engraft = str(pathlib.Path(arguments.parse_args().engraft).resolve())
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(engraft, folder)
        targets(bench)
        combined(bench)
    for line in not_run:
        print(f"not run  {line}")
    if failures:
        sys.exit(f"{len(failures)} of the comparisons failed")
    print("everything that was run agrees")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
