"""What the programs that make references for chat templates share: conversations, and how transformers renders them."""

import copy
import pathlib

from transformers.utils import chat_template_utils

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Today's weather in <city> & around \"it\".",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Größte Stadt"},
                "days": {"type": "integer", "default": 3, "minimum": 1.0, "maximum": 1e-07},
                "unit": {"type": ["string", "null"], "enum": ["°C", "°F", None]},
                "tags": {"type": "array", "items": {"type": "string"}},
                "exact": {"type": "boolean", "default": False},
            },
            "required": ["city"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


# -------------------------------------------------------------------------------------------------- rendering

NOW = "2025-03-09T08:05:00"


def freeze_clock():
    """Templates that ask for the time are told NOW."""

    class Frozen(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(NOW)

    chat_template_utils.datetime = Frozen


def template(family):
    """The template of a family, with `{#- said #}` and `{#- end said #}` around what the assistant says."""
    path = pathlib.Path(__file__).parent / "templates" / f"{family}.jinja"
    return path.read_text(encoding="utf-8")


def render(template, special, messages, tools=None, documents=None, add_generation_prompt=False, variables=None):
    """What transformers renders, and the spans of bytes that it marks as generated, in order."""
    rendered, spans = chat_template_utils.render_jinja_template(
        [copy.deepcopy(messages)], tools=copy.deepcopy(tools), documents=documents, chat_template=template,
        return_assistant_tokens_mask=True, add_generation_prompt=add_generation_prompt, **special, **(variables or {}),
    )  # fmt: skip
    text = rendered[0]
    return text, sorted([bytes_at(text, begin), bytes_at(text, end)] for begin, end in spans[0] if end > begin)


def bytes_at(text, at):
    return len(text[:at].encode("utf-8"))
