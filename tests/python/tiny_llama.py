"""Writes tests/fixtures/llama: small random Llama models, PEFT adapters for them, and what transformers, PEFT and
torch's AdamW compute with them in fp32. The Rust tests compare engraft's numbers with these.

    python tests/python/tiny_llama.py            (torch 2.11.0, transformers 5.17.0, peft 0.21.2)

Per model: `config.json`, `model*.safetensors` (or those of another in `BASES`), `adapter/` as PEFT saves it, and `reference.safetensors` with

    ids (T) i64          three documents end to end
    offsets (4) i64      where they begin and end
    mask (T) i64         1 where a token is a supervised target; the first token of a document never is
    base_logits (T, V)   without the adapter, every document on its own
    logits (T, V)        with it
    loss (1)             mean cross-entropy over the supervised targets of all documents together, with the adapter
    grad.<key>           its gradient, for each key of the adapter's file

and where training is recorded too, on batches `batch.<k>.{ids,offsets,mask}` used in turn (step s uses s mod 4):

    train.losses (20), train.gradient_norms (20)    before clipping
    final.<key>                                     the adapter after the last step

AdamW: lr 1e-2 constant, betas 0.9 and 0.999, eps 1e-8, weight decay 0.01, gradients clipped to norm 1.
"""

import json
import os
import pathlib
import shutil
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures" / "llama"
STEPS, BATCHES = 20, 4

# Odd sizes on purpose: nothing here is a power of two, and no two widths agree by accident.
COMMON = {
    "vocab_size": 97,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}

MODELS = {
    "grouped-tied": {},
    "biases-untied": {
        "num_key_value_heads": 3,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "linear": {
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5},
    },
    # Two of the documents are longer than the 16 positions it was made for, so the base grows; one is not.
    "dynamic": {
        "num_key_value_heads": 3,
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    },
    "yarn": {
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    # Heads that do not divide the width evenly: 4 x 10 on a width of 36.
    "llama3-wide-heads": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "dora": {"num_key_value_heads": 3, "attention_bias": True, "tie_word_embeddings": False},
    "whole-tied": None,
    "whole-untied": {"tie_word_embeddings": False},
    "tokens-tied": None,
    "tokens-untied": None,
    "whole-norms": {"attention_bias": True, "tie_word_embeddings": False},
}
# Whose base an adapter is of that has none of its own.
BASES = {"whole-tied": "grouped-tied", "tokens-tied": "grouped-tied", "tokens-untied": "whole-untied"}
# What an adapter is beside LoRA of rank 4.
ADAPTERS = {
    "dora": {"use_dora": True},
    "whole-tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "whole-untied": {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj", "down_proj"]},
    "whole-norms": {"modules_to_save": ["model.norm", "input_layernorm", "v_proj"], "target_modules": ["q_proj", "down_proj"]},
    "tokens-tied": {"trainable_token_indices": [3, 40, 17]},
    "tokens-untied": {"trainable_token_indices": {"lm_head": [5, 60], "embed_tokens": [8, 60, 1]}},
}

# Written in several shards, so that reading an index is tested on a real one.
SHARDED = "biases-untied"
# `config.json` rewritten as older transformers wrote it: `rope_theta` at the top and `rope_scaling` beside it, which is
# how the published Llama 2 and 3 checkpoints read. The oldest called the kind `type`.
OLD_STYLE = {"linear": "type", "llama3-wide-heads": "rope_type"}
# Trained for some steps too.
TRAINED = ["grouped-tied", "llama3-wide-heads", *ADAPTERS]


def randomise(model, generator):
    """Weights large enough that every part of the model matters to the logits."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(1.2 * noise / weight.shape[1] ** 0.5)


def documents(lengths, generator):
    """Random documents end to end, with a supervised stretch in each: ids (T), offsets, mask (T)."""
    ids, mask, offsets = [], [], [0]
    for length in lengths:
        ids.append(torch.randint(3, COMMON["vocab_size"], (length,), generator=generator))
        ids[-1][0] = COMMON["bos_token_id"]
        own = torch.zeros(length, dtype=torch.int64)
        start = int(torch.randint(1, length - 1, (1,), generator=generator))
        own[start:] = 1
        if length > 8:  # a second stretch, as in a dialogue
            own[1:3] = 1
        mask.append(own)
        offsets.append(offsets[-1] + length)
    return torch.cat(ids), torch.tensor(offsets), torch.cat(mask)


def forward(model, ids, offsets):
    """Logits (T, V), every document on its own and from the positions a fresh model starts with."""
    logits = []
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist()):
        for module in model.modules():
            # Dynamic scaling remembers the longest document it has seen; each document here is judged by its own length.
            if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_inv_freq"):
                module.max_seq_len_cached = module.original_max_seq_len
                module.register_buffer("inv_freq", module.original_inv_freq.clone(), persistent=False)
        logits.append(model(input_ids=ids[begin:end].unsqueeze(0)).logits[0])
    return torch.cat(logits)


def forward_base(model):
    """Logits of a fixed document."""
    with torch.no_grad():
        return forward(model, torch.arange(1, 24), torch.tensor([0, 23]))


def mean_loss(logits, ids, offsets, mask):
    """Mean cross-entropy over the supervised targets: the logits at i predict the token at i + 1 of the same document."""
    assert not mask[offsets[:-1]].any()
    targets = mask.nonzero().squeeze(1)
    return torch.nn.functional.cross_entropy(logits[targets - 1], ids[targets])


def tensors_of(model):
    """The adapter's tensors under the keys of its file."""
    return {k: v.detach().clone().contiguous() for k, v in get_peft_model_state_dict(model).items()}


def gradients_of(model):
    """The adapter's gradients under the keys of its file."""
    return {
        name.replace(".default", "").replace("_vector.weight", "_vector").replace(".modules_to_save", ""): p.grad.detach().clone().contiguous()
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def adapted(model, name, generator, **options):
    """The model with an adapter whose update is not nothing, saved in the folder of the fixture."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | options
    )
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for key, weight in peft.named_parameters():
            if "lora_B" in key:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
            elif "magnitude" in key:
                weight.mul_(1 + 0.2 * torch.randn(weight.shape, generator=generator))
            elif "modules_to_save" in key or "trainable_tokens" in key:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    peft.peft_config["default"].base_model_name_or_path = f"tiny-random/{name}"
    folder = FIXTURES / name / "adapter"
    peft.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    saved = json.loads(path.read_text())
    # PEFT keeps its targets in a set, whose order changes from run to run.
    saved["target_modules"] = sorted(saved["target_modules"])
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
    return peft


def make_base(name, options, generator):
    """One model."""
    folder = FIXTURES / name
    config = LlamaConfig(**{**COMMON, **options}, attn_implementation="eager")
    model = LlamaForCausalLM(config).float()
    randomise(model, generator)
    if config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(folder, max_shard_size="40KB" if name == SHARDED else "1GB")
    if name in OLD_STYLE:
        path = folder / "config.json"
        written = json.loads(path.read_text())
        scaling = written.pop("rope_parameters")
        written["rope_theta"] = scaling.pop("rope_theta")
        written["rope_scaling"] = {OLD_STYLE[name]: scaling.pop("rope_type"), **scaling}
        path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")

    before = forward_base(model)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(forward_base(model), before), f"{name} reads back as another model"


def make(name, options, seed):
    """One model with its adapter and references."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    if options is not None:
        make_base(name, options, generator)
    base = FIXTURES / BASES.get(name, name)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    ids, offsets, mask = documents([19, 7, 29], generator)
    with torch.no_grad():
        reference = {"ids": ids, "offsets": offsets, "mask": mask, "base_logits": forward(model, ids, offsets)}

    peft = adapted(model, name, generator, **ADAPTERS.get(name, {}))
    logits = forward(peft, ids, offsets)
    loss = mean_loss(logits, ids, offsets, mask)
    loss.backward()
    reference |= {"logits": logits.detach(), "loss": loss.detach().reshape(1)}
    reference |= {f"grad.{k}": v for k, v in gradients_of(peft).items()}
    assert all(v.abs().max() > 0 for k, v in reference.items() if k.startswith("grad.")), "a gradient is zero"
    # A head that shares what is trained of the embedding is stored, too.
    assert set(gradients_of(peft)) == set(tensors_of(peft)) - ({"base_model.model.lm_head.weight"} if name == "whole-tied" else set())

    if name in TRAINED:
        reference |= train(peft, generator)
    save_file({k: v.contiguous() for k, v in reference.items()}, folder / "reference.safetensors")

    # What was saved is what was measured.
    again = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    again = PeftModel.from_pretrained(again, folder / "adapter")
    with torch.no_grad():
        assert torch.equal(forward(again, ids, offsets), reference["logits"]), name
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    print(f"{name}: loss {loss.item():.4f}, logits within {reference['logits'].abs().max():.1f}, {size // 1024} KiB")


def train(peft, generator):
    """Some steps of AdamW from the saved adapter on."""
    batches = []
    for k in range(BATCHES):
        batches.append(documents([5 + k, 11, 8 + 3 * k][: 2 + k % 2], generator))
    recorded = {}
    for k, batch in enumerate(batches):
        recorded |= {f"batch.{k}.{what}": t for what, t in zip(["ids", "offsets", "mask"], batch)}
    losses, norms = steps(peft, batches)
    print(f"  trained: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    recorded |= {"train.losses": torch.tensor(losses), "train.gradient_norms": torch.tensor(norms)}
    return recorded | {f"final.{k}": v for k, v in tensors_of(peft).items()}


def steps(peft, batches):
    """Losses and gradient norms of some steps of AdamW on the batches in turn."""
    parameters = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        ids, offsets, mask = batches[step % BATCHES]
        loss = mean_loss(forward(peft, ids, offsets), ids, offsets, mask)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def main():
    """Makes every model."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for seed, (name, options) in enumerate(MODELS.items(), start=1):
        make(name, options, seed)


if __name__ == "__main__":
    main()
