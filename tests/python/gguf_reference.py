"""What transformers makes of a GGUF file: its tensors as f32 and the tokens of varied text.

    python tests/python/gguf_reference.py FILE.gguf FOLDER

The ignored test `real_gguf_equals_transformers` compares engraft's reading with it.
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = [
    "Hello, world!",
    "The capital of France is Paris.",
    "  two  spaces   three\n\n\nnewlines\t\ttabs \r\n",
    "I'm, you're, we'LL, 'tis; don't",
    "12345 3.14159 1,000,000 x2 ½ ² ٣٤",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass",
    "Zażółć gęślą jaźń. Grüße! Привет, мир. こんにちは世界 你好，世界 안녕하세요 مرحبا",
    "emoji 😀👩‍👩‍👧‍👦🇫🇷 and combining e\u0301 a\u0308",
    "\u00a0nbsp\u200bzero width\ufeffbom \u2028line",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a" * 200,
    "!!! ... --- *** ((())) [[[]]] {{{}}} <<>> @#$%^&*",
    " leading", "trailing ", " ", "", "\n",
]


def main() -> None:
    path, folder = pathlib.Path(sys.argv[1]).absolute(), pathlib.Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tensors = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string())
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    cases = [(text, tokenizer(text, add_special_tokens=False).input_ids) for text in TEXTS]
    (folder / "tokens.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main()
