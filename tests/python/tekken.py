"""Writes tests/fixtures/tokenizer/tekken: a small vocabulary as Mistral's models have it, and what transformers makes of
texts with it.

    python tests/python/tekken.py                      (transformers 5.17.0)

tekken.json  256 bytes and the tokens that byte-level BPE learns from the texts below, then some beyond the vocabulary
ids.json     [[text, ids, the text that transformers makes of the ids]]
"""

import base64
import json
import pathlib
import random

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.integrations.mistral.tokenizer import MistralConverter

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "fixtures" / "tokenizer" / "tekken"
SPECIAL = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "<pad>"]
COUNT = 20  # of special tokens, most without a name
BEYOND = 30  # tokens that the file holds and the vocabulary does not
PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = """the a of and to in is that it was for on are as with his they at be this from have or by one had not but what
all were when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more two like him see time could no make than first been its who now people my made over did down only way find
use may water long little very after words called just where most know straße naïve élève déjà vu señor ação Москва привет мир
данные модель 学习 模型 数据 语言 こんにちは 世界 トークン مرحبا العالم שלום עולם नमस्ते दुनिया ελληνικά γλώσσα 🙂 🚀 e\u0301 ﬁn McDonald HTTPServer
parseJSON snake_case 2024 3.14159 1,000,000 don't we'll I'm (x) {y} [z] <tag> https://example.org/a?b=c&d=e -> != == // """.split()


def texts(seed, count):
    """Words in a random order, between them what stands between words, and some characters from anywhere."""
    draw = random.Random(seed)
    for _ in range(count):
        parts = []
        for _ in range(draw.randint(1, 12)):
            word = draw.choice(WORDS)
            parts.append(draw.choice([word, word, word.upper(), word.title()]))
            parts.append(draw.choice([" ", " ", " ", "  ", "\n", "\r\n", "\t", ".", ", ", "\n\n", "", " \n "]))
            if draw.random() < 0.1:
                parts.append(chr(draw.choice([draw.randint(1, 0xD7FF), draw.randint(0xE000, 0x10FFFF)])))
        yield "".join(parts)


def learned():
    """The tokens that BPE learns, as bytes, in the order in which it learns them."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(0, 3000), trainer)
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[character] for character in token) for token, _ in by_id]
    return [bytes([byte]) for byte in range(256)] + [token for token in tokens if len(token) > 1]


def main():
    """Writes both files."""
    tokens = learned()
    names = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(SPECIAL)]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    config = {
        "pattern": PATTERN,
        "num_vocab_tokens": len(tokens),
        "default_vocab_size": COUNT + len(tokens) - BEYOND,
        "default_num_special_tokens": COUNT,
        "version": "v7",
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": names}, indent=0) + "\n")
    tokenizer = MistralConverter(str(path)).converted()
    asked = [*texts(1, 200), "", "<s>[INST] what is it [/INST] a <tag></s>", "[INST][INST]<SPECIAL_11><pad>", " " * 40 + "x"]
    rows = []
    for text in asked:
        ids = tokenizer.encode(text, add_special_tokens=True).ids
        rows.append([text, ids, tokenizer.decode(ids, skip_special_tokens=False)])
    (FOLDER / "ids.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(f"{len(vocab)} tokens, {len(rows)} texts, {sum(len(ids) for _, ids, _ in rows)} ids")


if __name__ == "__main__":
    main()
