"""Live parity with transformers and PEFT on the demo model, in fp32: `make parity`.

Checked, each on full tensors:

 1. the base: engraft's logits of the GGUF are transformers';
 2. the data: on the same rows, the loss of step 1 is what transformers computes over the assistants' tokens;
 3. our adapter has PEFT's keys and shapes, loads in PEFT and gives engraft's logits;
 4. our merged model gives them in transformers, and its tokenizer and chat template are the base's;
 5. PEFT's own adapters, plain and with every pattern, load in engraft and give PEFT's logits;
 6. training: from the same adapter on the same rows, some steps give PEFT's and torch AdamW's losses and weights.
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports, which read it
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOGITS = 1e-4  # of the largest logit
LOSS = 1e-4  # of the loss
WEIGHTS = 2e-3  # of the largest weight: AdamW divides by the root of squares, which magnifies rounding
# AdamW's first steps move an element by the sign of its gradient, also where that is nothing but rounding. An epsilon of the
# gradients' own size makes the step a smooth function of them, so that the adapters can be compared at all.
EPSILON = 1e-3
STEPS, MICRO_BATCH, ACCUMULATION, RATE = 4, 2, 2, 1e-3

failures = []


def check(what, difference, bound):
    """Prints and remembers one comparison."""
    good = difference <= bound
    print(f"{'ok  ' if good else 'FAIL'}  {what}: {difference:.2e} (bound {bound:.0e})", flush=True)
    if not good:
        failures.append(what)


def relative(ours, theirs):
    """Largest difference over the largest value; shapes must agree."""
    assert ours.shape == theirs.shape, f"shapes differ: engraft {tuple(ours.shape)}, reference {tuple(theirs.shape)}"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


class Engraft:
    """The executable."""

    def __init__(self, binary, model, work):
        self.binary, self.model, self.work = binary, model, work
        self.files = 0

    def run(self, *arguments):
        """Runs a verb; its output is shown only when it fails."""
        done = subprocess.run([self.binary, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(f"engraft {' '.join(map(str, arguments))}\nended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def logits(self, ids, adapter=None):
        """Logits (T, V) of one document."""
        self.files += 1
        out = self.work / f"logits-{self.files}.safetensors"
        extra = ["--adapter", adapter] if adapter else []
        self.run("logits", "--model", self.model, *extra, "--dtype", "fp32", "--ids", ",".join(map(str, ids)), "--out", out)
        return load_file(out)["logits"]

    def train(self, out, *settings):
        """Trains the quickstart's first rows in order, in fp32; returns the logged steps."""
        fixed = {
            "base_model": self.model,
            "dtype": "fp32",
            "device": "cpu",
            "dataset.shuffle": "false",
            "dataset.limit": STEPS * MICRO_BATCH * ACCUMULATION,
            "dataset.eval": "null",
            "training.max_steps": STEPS,
            "training.micro_batch_size": MICRO_BATCH,
            "training.gradient_accumulation_steps": ACCUMULATION,
            "training.learning_rate": RATE,
            "training.lr_scheduler": "constant",
            "training.warmup_steps": "0",
            "training.logging_steps": 1,
            "output.dir": out,
            "output.save": "[adapter, merged]",
        }
        overrides = [f"{key}={value}" for key, value in fixed.items()] + list(settings)
        self.run("train", "recipes/quickstart.yaml", *(a for o in overrides for a in ("--set", o)))
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return [m for m in map(json.loads, lines) if "loss" in m]


def logits_of(model, ids):
    """Logits (T, V) of one document."""
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def load_base(model):
    """The GGUF through transformers, in fp32. (Its progress bars are of no interest here.)"""
    with contextlib.redirect_stderr(io.StringIO()):
        return AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.float32)


def rows(tokenizer, count):
    """The first training rows as (ids, supervised), supervised from the ticket to its end-of-turn token."""
    import pyarrow.parquet as pq

    encoded = []
    for row in pq.read_table(ROOT / "datasets/tickets/train.parquet").slice(0, count).to_pylist():
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["messages"][-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        # The template ends a turn with a line break after its end; it is in the document but not learned.
        ending = tokenizer("\n", add_special_tokens=False)["input_ids"]
        encoded.append((prompt + answer + ending, [0] * len(prompt) + [1] * len(answer) + [0] * len(ending)))
    return encoded


def step_loss(model, documents):
    """Sum of cross-entropies over all supervised targets of the documents, and how many there are."""
    total, count = 0.0, 0
    for ids, supervised in documents:
        targets = torch.tensor(supervised).nonzero().squeeze(1)
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits[targets - 1], torch.tensor(ids)[targets], reduction="sum")
        count += len(targets)
    return total, count


def patterned(r):
    """Adapters as PEFT makes them: all linears alike, and every pattern at once."""
    yield "plain", LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", task_type="CAUSAL_LM")
    yield (
        "patterned",
        LoraConfig(
            r=r,
            lora_alpha=2 * r,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj"],
            layers_to_transform=[0, 3, 4, 17, 29],
            rank_pattern={"v_proj": 3},
            alpha_pattern={"down_proj": 5, r"layers\.3\.self_attn\.q_proj": 7},
            task_type="CAUSAL_LM",
        ),
    )


def peft_adapter(model, config, folder):
    """A PEFT model whose B is not zero, saved to `folder`."""
    torch.manual_seed(7)
    peft = get_peft_model(load_base(model), config)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    peft.save_pretrained(folder)
    return peft


def main():
    """Runs every check and says which failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engraft", required=True, type=lambda p: pathlib.Path(p).resolve())
    parser.add_argument("--model", required=True, type=lambda p: pathlib.Path(p).resolve(), help="the demo model's GGUF")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    model = arguments.model

    with tempfile.TemporaryDirectory(prefix="engraft-parity-") as work:
        work = pathlib.Path(work)
        engraft = Engraft(arguments.engraft, model, work)
        tokenizer = AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)
        documents = rows(tokenizer, STEPS * MICRO_BATCH * ACCUMULATION)
        ids = documents[0][0]
        base = load_base(model)

        ours = engraft.logits(ids)
        plain = logits_of(base, ids)
        check("logits of the base against transformers", relative(ours, plain), LOGITS)

        steps = engraft.train(work / "fresh")
        with torch.no_grad():
            total, count = step_loss(base, documents[: MICRO_BATCH * ACCUMULATION])
        expected = (total / count).item()
        check("loss of step 1 against transformers", abs(steps[0]["loss"] - expected) / expected, LOSS)

        adapter = work / "fresh" / "adapter"
        ours = engraft.logits(ids, adapter)
        check("our adapter changes the logits (share that must remain)", LOGITS / relative(ours, plain), 0.1)
        peft = PeftModel.from_pretrained(base, adapter)
        check("our adapter in PEFT", relative(ours, logits_of(peft, ids)), LOGITS)
        theirs = {k: v.shape for k, v in get_peft_model_state_dict(peft).items()}
        saved = {k: v.shape for k, v in load_file(adapter / "adapter_model.safetensors").items()}
        check("keys or shapes PEFT would have written otherwise", float(len(set(theirs.items()) ^ set(saved.items()))), 0)

        merged = AutoModelForCausalLM.from_pretrained(work / "fresh" / "merged", dtype=torch.float32)
        check("our merged model in transformers", relative(ours, logits_of(merged, ids)), LOGITS)
        check("its head is still tied", float(merged.lm_head.weight is not merged.model.embed_tokens.weight), 0)
        again = AutoTokenizer.from_pretrained(work / "fresh" / "merged")
        talk = [{"role": "user", "content": "Schöne Grüße, 12 345 <|im_end|> 🙂\n\tok"}, {"role": "assistant", "content": " x"}]
        rendered = tokenizer.apply_chat_template(talk, tokenize=False)
        check("its chat template", float(again.apply_chat_template(talk, tokenize=False) != rendered), 0)
        check("its tokenizer", float(again(rendered)["input_ids"] != tokenizer(rendered)["input_ids"]), 0)
        del merged, peft, base

        for name, config in patterned(6):
            peft = peft_adapter(model, config, work / name)
            check(f"PEFT's {name} adapter in engraft", relative(engraft.logits(ids, work / name), logits_of(peft, ids)), LOGITS)
            if name == "plain":
                started = peft

        steps = engraft.train(work / "continued", f"adapter.adapter_name_or_path={work / 'plain'}", "adapter.r=6", "adapter.lora_alpha=12", f"training.adam_epsilon={EPSILON}")
        parameters = [p for p in started.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=RATE, eps=EPSILON, weight_decay=0.0)
        for step, logged in zip(range(STEPS), steps, strict=True):
            optimizer.zero_grad()
            batch = documents[step * MICRO_BATCH * ACCUMULATION :][: MICRO_BATCH * ACCUMULATION]
            total, count = step_loss(started, batch)
            (total / count).backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0).item()
            optimizer.step()
            loss = total.item() / count
            check(f"step {step + 1}: loss against PEFT and torch AdamW", abs(logged["loss"] - loss) / loss, LOSS)
            check(f"step {step + 1}: gradient norm", abs(logged["grad_norm"] - norm) / norm, 10 * LOSS)
        ours = load_file(work / "continued" / "adapter" / "adapter_model.safetensors")
        theirs = get_peft_model_state_dict(started)
        check("the adapter after them", max(relative(ours[k], v) for k, v in theirs.items()), WEIGHTS)

    if failures:
        sys.exit(f"{len(failures)} comparisons failed: {'; '.join(failures)}")
    print("parity holds")


if __name__ == "__main__":
    main()
