"""The works of bench/grid.py: sizes of models, documents, and the arithmetic of a step. The standard library only."""

import random
import string

RANK, ALPHA, RATE = 16, 32, 1e-4
WARMUP, STEPS = 10, 30
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# L, d, f, H, Hk, h, V, whether embedding and head are one, and what else config.json says.
LLAMA3 = {
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
QWEN3 = {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6}
MODELS = {
    "llama-3.1-8b": ("llama", 32, 4096, 14336, 32, 8, 128, 128256, False, LLAMA3),
    "qwen3-8b": ("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False, QWEN3),
    "qwen3-0.6b": ("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, True, QWEN3),
    "smollm2-135m": ("llama", 30, 576, 1536, 9, 3, 64, 49152, True, {"rope_theta": 100000.0, "rms_norm_eps": 1e-5}),
    "llama-70b-slice": ("llama", 2, 8192, 28672, 64, 8, 128, 128256, False, LLAMA3),
    "tiny-llama": ("llama", 4, 256, 768, 4, 2, 64, 4096, True, {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}),
    "tiny-qwen3": ("qwen3", 3, 256, 512, 4, 2, 64, 4096, False, QWEN3),
}


def mixed(documents, middle, longest, seed=0):
    """Lengths as answers to school problems have them: most near the middle, a few far longer."""
    drawn = random.Random(seed)
    return [max(16, min(longest, round(drawn.lognormvariate(0, 0.45) * middle))) for _ in range(documents)]


# A model, documents of a micro-batch, and whether the base is in four bits.
GRIDS = {
    "gpu": [
        ("llama-3.1-8b", "8x2048", False),
        ("llama-3.1-8b", "4x4096", False),
        ("llama-3.1-8b", "8x2048", True),
        ("llama-3.1-8b", "4x4096", True),
        ("llama-3.1-8b", "mixed-64x200", False),
        ("qwen3-8b", "8x2048", False),
        ("qwen3-8b", "8x2048", True),
        ("qwen3-0.6b", "2x2048", False),
        ("smollm2-135m", "16x1024", False),
        ("llama-70b-slice", "4x4096", False),
    ],
    "cpu": [
        ("tiny-llama", "4x128", False),
        ("tiny-llama", "4x128", True),
        ("tiny-llama", "mixed-12x60", False),
        ("tiny-qwen3", "2x256", False),
    ],
}


def lengths_of(work):
    """Tokens of the documents of a micro-batch; peers pad those that are mixed, engraft lays them end to end."""
    documents, length = work.removeprefix("mixed-").split("x")
    return mixed(int(documents), int(length), 4 * int(length)) if work.startswith("mixed-") else [int(length)] * int(documents)


LETTERS = string.ascii_letters
END = "<|end|>"


def token_ids():
    """Ids of letters and of the end of a document, those of the tokenizer that is written."""
    return {END: 0, **{letter: 1 + i for i, letter in enumerate(LETTERS)}}


def documents_of(work):
    """The micro-batch of every step, the same each time: texts, a token to a letter, and one more token behind each."""
    drawn = random.Random(work)
    return ["".join(drawn.choices(LETTERS, k=n - 1)) for n in lengths_of(work)]


def config_of(name):
    """config.json."""
    model_type, layers, d, f, heads, kv_heads, head, vocabulary, tied, more = MODELS[name]
    return {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]], "model_type": model_type,
        "num_hidden_layers": layers, "hidden_size": d, "intermediate_size": f, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head, "vocab_size": vocabulary, "tie_word_embeddings": tied,
        "max_position_embeddings": 32768, "hidden_act": "silu", "attention_bias": False, "eos_token_id": 0, "torch_dtype": "bfloat16",
        **more,
    }  # fmt: skip


def tensors_of(name):
    """(name, shape) of a checkpoint's tensors."""
    model_type, layers, d, f, heads, kv_heads, head, vocabulary, tied, _ = MODELS[name]
    yield "model.embed_tokens.weight", (vocabulary, d)
    for i in range(layers):
        at = f"model.layers.{i}"
        for what, rows, columns in [("q", heads * head, d), ("k", kv_heads * head, d), ("v", kv_heads * head, d), ("o", d, heads * head)]:
            yield f"{at}.self_attn.{what}_proj.weight", (rows, columns)
        if model_type == "qwen3":
            yield f"{at}.self_attn.q_norm.weight", (head,)
            yield f"{at}.self_attn.k_norm.weight", (head,)
        for what, rows, columns in [("gate", f, d), ("up", f, d), ("down", d, f)]:
            yield f"{at}.mlp.{what}_proj.weight", (rows, columns)
        yield f"{at}.input_layernorm.weight", (d,)
        yield f"{at}.post_attention_layernorm.weight", (d,)
    yield "model.norm.weight", (d,)
    if not tied:
        yield "lm_head.weight", (vocabulary, d)


def adapter_config(name):
    """adapter_config.json of the adapter that every kind starts from, in PEFT's layout."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": name, "r": RANK, "lora_alpha": ALPHA,
        "lora_dropout": 0.0, "target_modules": LINEARS, "bias": "none", "inference_mode": False,
    }  # fmt: skip


def adapter_sites(name):
    """(module, outputs, inputs) of the linears that are trained."""
    for tensor, shape in tensors_of(name):
        if tensor.removesuffix(".weight").rpartition(".")[2] in LINEARS:
            yield tensor.removesuffix(".weight"), *shape


def arithmetic(model, lengths):
    """FLOP of a step by what they are for, and the bytes of activations that are saved and read."""
    _, L, d, f, H, Hk, h, V, _, _ = MODELS[model]
    tokens, attended = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    p_l = L * (2 * d * H * h + 2 * d * Hk * h + 3 * d * f)
    p_a = L * RANK * ((d + H * h) + 2 * (d + Hk * h) + (H * h + d) + 2 * (d + f) + (f + d))
    # Nothing follows a document's last token.
    matrices = tokens * (4 * p_l + 6 * p_a) + (tokens - len(lengths)) * 4 * V * d
    return {
        "model": matrices + 12 * L * H * h * attended, "matrices": matrices, "attention": L * H * h * attended, "weights": p_l,
        "moved": 2 * tokens * L * (2 * (2 * d + (H + 2 * Hk) * h + H * h + 2 * f) + 4 * H),
    }  # fmt: skip


def floor_seconds(rates, model, lengths, four_bit):
    """The time that a step takes at the machine's rates, nothing recomputed."""
    of = arithmetic(model, lengths)
    made_whole = of["weights"] * (0.5 + 1 / 64 + 4 / 16384 + 2) / rates["copy"]
    return (
        of["matrices"] / rates["gemm"]
        + 4 * of["attention"] / rates["attention_forward"]
        + 10 * of["attention"] / rates["attention_backward"]
        + of["moved"] / rates["copy"]
        + (2 * made_whole if four_bit else 0.0)
    )
