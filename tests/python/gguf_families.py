"""Writes tests/fixtures/gguf: small models of `tests/fixtures/families`, as llama.cpp's own converter lays them out.

    python tests/python/gguf_families.py --llama-cpp FOLDER     (torch; the sources of llama.cpp in FOLDER)

The converter reads the checkpoint that `config.json` and `tensors.json` of a fixture describe; only the vocabulary is a
stand-in, since these models have none. The Rust tests read each GGUF file and compare config and tensors with the
fixture's, so what the converter does to names, rows and norms is undone or seen.
"""

import argparse
import json
import pathlib
import re
import sys
import tempfile

import torch
from safetensors.torch import save_file

from families import FIXTURES, drawn

OUT = FIXTURES.parent / "gguf"
# transformers' class by fixture.
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "phi3-longrope": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "falcon": "FalconForCausalLM",
    "falcon-grouped": "FalconForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "gpt_neox-sequential": "GPTNeoXForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "stablelm-sequential": "StableLmForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "glm4": "Glm4ForCausalLM",
    "bloom": "BloomForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe-sliding": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "phi": "PhiForCausalLM",
    "mistral3": "Mistral3ForConditionalGeneration",
}
# What of a fixture a GGUF file cannot say: fields of the config that differ, and tensors left out.
CHANGES = {
    "mistral": ({"sliding_window": None}, r"(?!)"),
    "smollm3": ({"use_sliding_window": False, "sliding_window": None, "no_rope_layer_interval": 4}, r"(?!)"),
    "qwen2": ({"use_sliding_window": False}, r"(?!)"),
    "qwen3": ({"use_sliding_window": False}, r"(?!)"),
    "gemma2": ({"query_pre_attn_scalar": 10}, r"(?!)"),
    "gemma3_text": ({"query_pre_attn_scalar": 10, "sliding_window_pattern": 6}, r"(?!)"),
    "starcoder2": ({"sliding_window": None}, r"(?!)"),
    "bloom": ({"seq_length": 2048}, r"(?!)"),
    "gpt_neox-sequential": ({"rotary_emb_base": 10000, "hidden_act": "gelu"}, r"(?!)"),
    "stablelm": ({"qk_layernorm": False}, r"[qk]_layernorm"),
    "falcon": ({"bias": False, "num_kv_heads": 1, "max_position_embeddings": 2048}, r"(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.bias"),
    "falcon-grouped": ({"bias": False, "max_position_embeddings": 2048}, r"(query_key_value|dense|dense_h_to_4h|dense_4h_to_h)\.bias"),
    # Every layer must have experts; Qwen 2's weights are never made to add up to 1, Qwen 3's always.
    "qwen2_moe": ({"num_hidden_layers": 1, "mlp_only_layers": []}, r"layers\.[12]\."),
    "qwen3_moe-sliding": ({"use_sliding_window": False, "sliding_window": None, "norm_topk_prob": True}, r"(?!)"),
    "mixtral": ({"sliding_window": None}, r"(?!)"),
    "phi": ({"qk_layernorm": False}, r"[qk]_layernorm"),
    "cohere2": ({"attention_bias": False, "rotary_pct": 1.0, "sliding_window_pattern": 4}, r"_proj\.bias"),
}


def vocabulary(writer, size):
    """A byte-level vocabulary of that many tokens."""
    import gguf

    tokens = [chr(0x21 + i) for i in range(size - 1)] + ["!#"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * size)
    writer.add_token_merges(["! #"])


def convert(name, base):
    """One fixture through the converter."""
    import gguf

    source = FIXTURES / name
    changes, left_out = CHANGES.get(name, ({}, r"(?!)"))
    config = json.loads((source / "config.json").read_text()) | changes | {"architectures": [CLASSES[name]]}
    size = config.get("text_config", config)["vocab_size"]
    rows = json.loads((source / "tensors.json").read_text())
    with tempfile.TemporaryDirectory() as place:
        work = pathlib.Path(place) / name  # the file says what folder it was made of
        work.mkdir()
        (work / "config.json").write_text(json.dumps(config))
        save_file({n: drawn(n, *rest, 0) for n, *rest in rows if not re.search(left_out, n)}, work / "model.safetensors", metadata={"format": "pt"})
        # Gemma 3's converter counts the tokens there.
        tokens = {"model": {"vocab": dict.fromkeys(map(str, range(size)))}, "added_tokens": []}
        (work / "tokenizer.json").write_text(json.dumps(tokens))
        kind = base.get_model_class(CLASSES[name])
        for one in (kind, getattr(kind, "Ministral3Model", kind)):  # which does the work of the other
            one.set_vocab = lambda self: vocabulary(self.gguf_writer, size)
        model = kind(work, gguf.LlamaFileType.ALL_F32, OUT / f"{name}.gguf", hparams=config, eager=True)
        model.write()


def main():
    """Converts what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--llama-cpp", required=True, type=pathlib.Path, help="folder with llama.cpp's sources")
    parser.add_argument("--family", help="only this fixture")
    arguments = parser.parse_args()
    # Its own gguf package goes with it: a release's may be older.
    sys.path[:0] = [str(arguments.llama_cpp), str(arguments.llama_cpp / "gguf-py")]
    import conversion

    OUT.mkdir(exist_ok=True)
    changes = {name: fields for name, (fields, _) in CHANGES.items()}
    (OUT / "changes.json").write_text(json.dumps(changes, indent=2, sort_keys=True) + "\n")
    torch.set_num_threads(1)
    for name in CLASSES:
        if arguments.family in (None, name):
            convert(name, conversion)
            print(f"{name}: {(OUT / f'{name}.gguf').stat().st_size // 1024} KiB", flush=True)


if __name__ == "__main__":
    main()
