"""Writes tests/fixtures/llama/qlora-*: as `tiny_llama.py`, with the base quantised by bitsandbytes 0.50.2 on the CPU, as PEFT trains
on it. `quantised/` is the base as transformers saves it then (`quantised-int8/`: in eight bits); those without a base of their own
have that of `qlora-nf4`.

Widths are multiples of 64, the block: where a row is not, bitsandbytes' kernel for AVX-512 takes the wrong scales.
"""

import shutil
import warnings

import tiny_llama
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

WIDTHS = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
MODELS = {
    "qlora-nf4": (WIDTHS | {"tie_word_embeddings": False}, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {}),
    "qlora-fp4": (WIDTHS | {"attention_bias": True}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}, {}),
    "qlora-dora": (None, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {"use_dora": True}),
    "qlora-head": (None, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {"modules_to_save": ["lm_head"]}),
    "qlora-tokens": (None, {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {"trainable_token_indices": [3, 40, 17]}),
}


def quantised(folder, options):
    """The model of a folder, quantised while it is loaded."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    model = LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", quantization_config=config, device_map="cpu"
    )
    # Out of training, bitsandbytes multiplies in bf16 on processors with AVX512-BF16, whatever type is asked for.
    return model.train()


def make(name, options, how, adapter, seed):
    """One model with its adapter and references."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    folder = tiny_llama.FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    base = folder if options else tiny_llama.FIXTURES / "qlora-nf4"
    if options:
        model = LlamaForCausalLM(LlamaConfig(**{**tiny_llama.COMMON, **options}, attn_implementation="eager")).float()
        tiny_llama.randomise(model, generator)
        if model.config.tie_word_embeddings:
            model.tie_weights()
        model.save_pretrained(folder)

    model = quantised(base, how)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    if options:
        model.save_pretrained(folder / "quantised")
    ids, offsets, mask = tiny_llama.documents([19, 7, 29], generator)
    with torch.no_grad():
        base = tiny_llama.forward(model, ids, offsets)
    peft = tiny_llama.adapted(model, name, generator, **adapter)

    logits = tiny_llama.forward(peft, ids, offsets)
    loss = tiny_llama.mean_loss(logits, ids, offsets, mask)
    loss.backward()
    reference = {"ids": ids, "offsets": offsets, "mask": mask, "base_logits": base, "logits": logits.detach()}
    reference |= {"loss": loss.detach().reshape(1)} | {f"grad.{k}": v for k, v in tiny_llama.gradients_of(peft).items()}
    reference |= tiny_llama.train(peft, generator)
    save_file({k: v.contiguous() for k, v in reference.items()}, folder / "reference.safetensors")
    print(f"{name}: loss {loss.item():.4f}")


def eight_bits(name):
    """The base of a model in eight bits as transformers saves it: `quantised-int8/`."""
    folder = tiny_llama.FIXTURES / name
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config, device_map="cpu")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear8bitLt"
    model.save_pretrained(folder / "quantised-int8")


def main():
    """Makes every model."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for seed, (name, description) in enumerate(MODELS.items(), start=101):
        make(name, *description, seed)
    eight_bits("qlora-nf4")


if __name__ == "__main__":
    main()
