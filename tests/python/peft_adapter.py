"""Writes tests/fixtures/peft: tiny models, adapters as PEFT saves them, and PEFT's own answers about them.

    PYTHONHASHSEED=0 python tests/python/peft_adapter.py        (torch 2.11.0, transformers 5.17.0, peft 0.21.2)

base-tied/, base-untied/    tiny random Llamas: `config.json`, `model.safetensors`
<case>/                     `adapter_config.json`, `adapter_model.safetensors` as PEFT saves them, `recipe.json` (the same
                            wishes as engraft's recipe has them), `merged.safetensors` (fp32, by PEFT) for some
more/<case>/             adapters that use more than plain LoRA on linears
targets.json                {models: {name: {linears: [[name, out, in]], head}}, cases: [{model, recipe, expected, saved}]}
                            with `expected` [[index of the linear, r, alpha, scale]] and `saved`, the target_modules
                            PEFT writes

The hash seed fixes the order in which PEFT, which keeps target_modules in a set, writes them.
"""

import json
import os
import pathlib
import shutil
import sys
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it
if os.environ.get("PYTHONHASHSEED") != "0":
    sys.exit("run with PYTHONHASHSEED=0, so that the files do not change from run to run")

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Phi3Config, Qwen3Config

FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "peft"

TINY = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}
MODELS = {
    # 21 linears: at 20 and more PEFT condenses a long target list into suffixes.
    "tied": LlamaConfig(**TINY, num_hidden_layers=3, tie_word_embeddings=True),
    "untied": LlamaConfig(**TINY, num_hidden_layers=2, tie_word_embeddings=False),
    "qwen3": Qwen3Config(**TINY, num_hidden_layers=11, head_dim=4, pad_token_id=None),
    "phi3": Phi3Config(**TINY, num_hidden_layers=2, pad_token_id=None),
    "neox": GPTNeoXConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_attention_heads=2, num_hidden_layers=2),
}

# name: (model, recipe). Keys as engraft's; `init_lora_weights` is translated below.
ADAPTERS = {
    "all-linear": ("tied", {"r": 2, "lora_alpha": 4.0}),
    "all-linear-short": ("untied", {"r": 3, "lora_alpha": 8.0, "init_lora_weights": "gaussian"}),
    "names": ("tied", {"r": 2, "lora_alpha": 5.5, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj"]}),
    "regex": ("tied", {"r": 1, "target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"}),
    "patterns": (
        "tied",
        {
            "r": 2,
            "lora_alpha": 6.0,
            "target_modules": ["q_proj", "o_proj", "mlp.down_proj"],
            "exclude_modules": ["layers.2.self_attn.o_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, r"^model\.layers\.0\..*": 1},
            "alpha_pattern": {"o_proj": 12.0, "down_proj": 3.5},
            "use_rslora": True,
        },
    ),
    "layers": ("tied", {"r": 2, "target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [0, 2]}),
    "head": ("untied", {"r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj", "lm_head"]}),
}
MERGED = ["all-linear", "patterns", "head"]

REFUSED = {
    "dora": {"use_dora": True, "target_modules": ["q_proj"]},
    "bias": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "lora-bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "modules-to-save": {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "trainable-tokens": {"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["q_proj"]},
}

SPECS = {
    "tied": [
        {},
        {"target_modules": "ALL-linear"},
        {"target_modules": ["q_proj"]},
        {"target_modules": ["self_attn.q_proj", "layers.1.mlp.up_proj"]},
        {"target_modules": ["model.layers.2.mlp.gate_proj", "k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "1.self_attn.v_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.[12]\..*q_proj"},
        {"exclude_modules": ["down_proj"]},
        {"target_modules": r"model\.layers\.(0|1)\.self_attn\..*"},
        {"target_modules": r".*(q|k)_proj"},
        {"target_modules": r".*q_proj|.*v_proj"},
        {"target_modules": r".*\.mlp\.[a-z]+_proj", "exclude_modules": ["gate_proj"]},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3.0}},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 4, "q_proj": 2}},
        {"rank_pattern": {"self_attn.*": 5, "mlp.(up|down)_proj": 6}},
        {"rank_pattern": {r"model.layers.\d.mlp.up_proj": 3}, "alpha_pattern": {r"layers\.[01]\..*": 7.0}},
        {"rank_pattern": {"o_proj": 4, "q_proj|v_proj": 9}, "use_rslora": True},
        {"r": 64, "lora_alpha": 16.0, "use_rslora": True},
        {"r": 6, "alpha_pattern": {"q_proj": 12.5}, "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ],
    "untied": [{}, {"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ".*(lm_head|o_proj)"}],
    "qwen3": [
        {},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 10]},
        {"target_modules": ["1.self_attn.q_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": [f"layers.{i}.mlp.up_proj" for i in range(5)]},
        # Long lists, condensed into suffixes that keep clear of everything else.
        {"target_modules": [f"model.layers.{i}.self_attn.{m}_proj" for i in range(11) for m in "qk"]},
        {"target_modules": [f"model.layers.{i}.self_attn.{m}_proj" for i in range(10) for m in "qk"]},
        {"target_modules": [f"layers.{i}.{m}" for i in range(7) for m in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]},
    ],
    "phi3": [{}, {"target_modules": ["qkv_proj", "gate_up_proj"]}],
    "neox": [{}, {"target_modules": ["query_key_value", "dense"]}],
}


def build(name, generator):
    model = AutoModelForCausalLM.from_config(MODELS[name])
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 3)
    model.name_or_path = "owner/tiny"  # what get_peft_model writes into the config
    return model


def peft_config(recipe):
    wishes = {"r": 16, "lora_alpha": 32.0, "target_modules": "all-linear", **recipe}
    # PEFT declares it an integer; engraft's recipe is typed and has it as a number.
    whole = lambda x: int(x) if x == int(x) else x
    wishes["lora_alpha"] = whole(wishes["lora_alpha"])
    if "alpha_pattern" in wishes:
        wishes["alpha_pattern"] = {k: whole(v) for k, v in wishes["alpha_pattern"].items()}
    # A recipe's patterns are a sorted map, as PEFT's own are after it has saved them once.
    for key in ("rank_pattern", "alpha_pattern"):
        wishes[key] = dict(sorted(wishes.get(key, {}).items()))
    return LoraConfig(**wishes, task_type="CAUSAL_LM")


def adapted(peft):
    """{module: [r, alpha, scale]} of every module that got an adapter."""
    found = {}
    for name, module in peft.base_model.model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            found[name] = [module.r["default"], float(module.lora_alpha["default"]), module.scaling["default"]]
    return found


def save(peft, folder, generator):
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_" in name or weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
    peft.save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").chmod(0o644)


def main():
    warnings.simplefilter("ignore")
    shutil.rmtree(FIXTURES, ignore_errors=True)
    generator = torch.Generator().manual_seed(7)

    for name in ("tied", "untied"):
        folder = FIXTURES / f"base-{name}"
        build(name, torch.Generator().manual_seed(1)).save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        (folder / "model.safetensors").chmod(0o644)

    for name, (model, recipe) in ADAPTERS.items():
        folder = FIXTURES / name
        peft = get_peft_model(build(model, torch.Generator().manual_seed(1)), peft_config(recipe))
        save(peft, folder, generator)
        (folder / "recipe.json").write_text(json.dumps({"model": model, "adapter": recipe}, indent=2) + "\n")
        if name in MERGED:
            merged = peft.merge_and_unload().state_dict()
            merged = {k: v.contiguous() for k, v in merged.items() if model == "untied" or k != "lm_head.weight"}
            save_file(merged, folder / "merged.safetensors", metadata={"format": "pt"})

    for name, wishes in REFUSED.items():
        config = LoraConfig(r=2, task_type="CAUSAL_LM", **wishes)
        peft = get_peft_model(build("untied", torch.Generator().manual_seed(1)), config)
        save(peft, FIXTURES / "more" / name, generator)

    models, cases = {}, []
    for name, specs in SPECS.items():
        model = build(name, generator)
        linears = [[n, m.out_features, m.in_features] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
        models[name] = {"linears": linears, "head": head}
        for recipe in specs:
            peft = get_peft_model(build(name, generator), peft_config(recipe))
            saved = peft.peft_config["default"].target_modules
            saved = saved if isinstance(saved, str) else sorted(saved)
            found = adapted(peft)
            expected = [[i, *found.pop(n)] for i, (n, _, _) in enumerate(linears) if n in found]
            assert not found, f"PEFT adapted what is not a linear: {found}"
            cases.append({"model": name, "recipe": recipe, "expected": expected, "saved": saved})
    (FIXTURES / "targets.json").write_text(compact({"models": models, "cases": cases}))


def compact(value):
    """JSON with one line per model and per case."""
    models = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value["models"].items())
    cases = ",\n".join(f"  {json.dumps(case)}" for case in value["cases"])
    return f'{{"models": {{\n{models}\n}},\n"cases": [\n{cases}\n]}}\n'


if __name__ == "__main__":
    main()
