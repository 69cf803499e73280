"""Makes tests/fixtures/chat-families: chat templates of the constructs that the published ones of each family use.

Run with transformers 5.17 installed:  python tests/python/family_templates.py
The templates are in tests/python/templates; every one, and every conversation here, is our own. `{#- said #}` and
`{#- end said #}` stand around what the assistant says: as comments they print nothing, as `{% generation %}` tags they tell
from transformers itself what a mask must cover.
"""

import json
import pathlib
import re

from chat import CLOCK, NOW, WEATHER, assistant, freeze_clock, render, system, template, user

TARGET = pathlib.Path(__file__).parent.parent / "fixtures" / "chat-families"

# ---------------------------------------------------------------------------------------------- conversations


def call(name, arguments, id="abc123def"):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content, name="weather", id="abc123def"):
    return {"role": "tool", "name": name, "tool_call_id": id, "content": content}


LOOK = call("weather", {"city": "Köln", "days": 2, "exact": True, "near": [1.0, None, "<x>"]})
TIME = call("clock", {"zone": "UTC"}, id="zzz999yyy")
SPELLED = call("weather", '{"city": "Köln"}')

CONVERSATIONS = {
    "plain": [user("What is 2 + 2?"), assistant("4, of course.")],
    "system": [system("Be brief.\n"), user("  Hello \"there\"! "), assistant("\nHi.\n")],
    "turns": [system("Sys & <more>."), user("One?"), assistant("Two."), user("Three?\n\nReally?"), assistant("Four: «четыре» 四 🙂")],
    "empty system": [system(""), user("One?"), assistant("Two."), user("Three?"), assistant("Four.")],
    "asked": [system("Sys."), user("One?"), assistant("Two."), user("Three?")],
    "call": [system("Use tools."), user("Weather?"), assistant("", tool_calls=[LOOK]), tool('{"t": 21.5}'), assistant("It is 21.5 °C.")],
    "silent call": [user("Weather?"), assistant(None, tool_calls=[LOOK]), tool("rain"), assistant("Rain."), user("Sure?"), assistant("Yes.")],
    "spelled call": [user("Weather?"), assistant(None, tool_calls=[SPELLED]), tool("rain"), assistant("Rain.")],
    "call after text": [user("Weather?"), assistant("I look.", tool_calls=[LOOK]), tool("rain"), assistant("Rain.")],
    "calls": [user("Both?"), assistant("", tool_calls=[LOOK, TIME]), tool("rain"), tool("noon", "clock", "zzz999yyy"), assistant("Rain at noon.")],
    "last call": [user("Weather?"), assistant("", tool_calls=[LOOK])],
    "steps": [
        user("Both?"),
        assistant("", tool_calls=[LOOK], reasoning_content="First the rain."),
        tool("rain"),
        assistant("", tool_calls=[TIME], reasoning_content="Then the time."),
        tool("noon", "clock", "zzz999yyy"),
        assistant("Rain at noon.", reasoning_content="All known."),
        user("Thanks."),
        assistant("Welcome.", reasoning_content="Polite.\n"),
    ],
    "thinking": [user("Why?"), assistant("<think>\nFirst.\n</think>\n\nBecause."), user("And?"), assistant("<think>\nSecond.\n</think>\n\nThat is <b>all</b>.")],
    "thinking apart": [user("Why?"), assistant("Because.", thinking="Let me see."), user("And?"), assistant("So.", thinking="Hm.")],
    "switched": [system("Think little. /no_think"), user("Why? /no_think"), assistant("So.")],
    "parts": [user([{"type": "text", "text": " One "}, {"type": "text", "text": "two?"}]), assistant([{"type": "text", "text": "Three."}])],
}  # fmt: skip

RICH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Finds \"things\".\nAll of them.",
        "parameters": {
            "type": "object",
            "properties": {
                "query": {"type": "string", "description": "What for", "default": "x"},
                "count": {"type": "integer", "default": 10},
                "kind": {"type": "string", "enum": ["a", "b\"c"], "default": "a"},
                "flags": {"type": "array", "items": {"type": "boolean"}, "nullable": True},
                "rows": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "integer"}, "tag": {"type": ["string", "null"]}}, "required": ["id"]}},
                "either": {"oneOf": [{"type": "string", "description": "text", "default": "d"}, {"type": "number"}]},
                "free": {"type": "object"},
                "untyped": {"description": "Anything"},
            },
            "required": ["query", "kind"],
        },
        "return": {"type": "string", "description": "What was found"},
    },
}  # fmt: skip

VARIATIONS = {
    "none": {},
    "prompt": {"add_generation_prompt": True},
    "tools": {"tools": [WEATHER, CLOCK]},
    "off": {"tools": [WEATHER, RICH], "add_generation_prompt": True, "variables": {"enable_thinking": False, "tools_in_user_message": False, "reasoning_effort": "high", "xml_tools": [CLOCK]}},
    "on": {"add_generation_prompt": True, "variables": {"enable_thinking": True, "thinking": True, "builtin_tools": ["browser", "weather"], "date_string": "1 Jan 2030", "python_tools": ["def f(): ..."]}},
}  # fmt: skip
"""Of which conversations more than the first variation is rendered."""
VARIED = ["turns", "empty system", "call", "asked"]

# --------------------------------------------------------------------------------------------------- families

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
BRACKETS = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]"]  # fmt: skip
BARS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"]  # fmt: skip
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

FAMILY = {}


def family(name, eos, special, bos=None, ends=(), plain=()):
    FAMILY[name] = {"eos": eos, "bos": bos, "ends": list(ends), "special": special, "plain": list(plain), "template": template(name)}


family("llama-3", "<|eot_id|>", LLAMA, bos="<|begin_of_text|>", ends=["<|end_of_text|>", "<|eom_id|>"])
family("llama-4", "<|eot|>", ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|python_start|>", "<|python_end|>", "<|image|>"], bos="<|begin_of_text|>", ends=["<|end_of_text|>", "<|eom|>"])  # fmt: skip
family("qwen-2.5", "<|im_end|>", CHATML, ends=["<|endoftext|>"], plain=MARKUP)
family("qwen-3", "<|im_end|>", CHATML, ends=["<|endoftext|>"], plain=MARKUP)
family("qwen-3.5", "<|im_end|>", CHATML + ["<|image_pad|>"], ends=["<|endoftext|>"], plain=MARKUP)
family("mistral-v3", "</s>", BRACKETS, bos="<s>")
family("mistral-tekken", "</s>", BRACKETS, bos="<s>")
family("gemma-2", "<eos>", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], bos="<bos>", ends=["<end_of_turn>"])
family("gemma-3", "<eos>", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"], bos="<bos>", ends=["<end_of_turn>"])
family("gemma-4", "<turn|>", ["<bos>", "<eos>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'], bos="<bos>", ends=["<eos>", "<|tool_response>"])  # fmt: skip
family("phi-3", "<|endoftext|>", BARS, ends=["<|end|>"])
family("phi-4-mini", "<|endoftext|>", BARS, ends=["<|end|>"])
family("phi-4", "<|im_end|>", CHATML + ["<|im_sep|>"], ends=["<|endoftext|>"])
family("deepseek-v3", "<｜end▁of▁sentence｜>", ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"], bos="<｜begin▁of▁sentence｜>", plain=["<think>", "</think>"])  # fmt: skip
family("smollm-2", "<|im_end|>", CHATML, ends=["<|endoftext|>"])
family("smollm-3", "<|im_end|>", CHATML, ends=["<|endoftext|>"], plain=MARKUP)
family("gpt-oss", "<|return|>", ["<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"], bos="<|startoftext|>", ends=["<|endoftext|>", "<|call|>"])  # fmt: skip
family("glm-4", "<|endoftext|>", ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], ends=["<|user|>", "<|observation|>"])  # fmt: skip
family("glm-4.5", "<|endoftext|>", ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], ends=["<|user|>", "<|observation|>"], plain=MARKUP)  # fmt: skip

# --------------------------------------------------------------------------------------------------- rendering


def tagged(template):
    """The template with generation tags where it says who speaks."""
    template = re.sub(r"\{#(-?) said (-?)#\}", r"{%\1 generation \2%}", template)
    return re.sub(r"\{#(-?) end said (-?)#\}", r"{%\1 endgeneration \2%}", template)


def main():
    freeze_clock()
    TARGET.mkdir(parents=True, exist_ok=True)
    for name, family in FAMILY.items():
        special = {"eos_token": family["eos"], **({"bos_token": family["bos"]} if family["bos"] else {})}
        cases = []
        for title, messages in CONVERSATIONS.items():
            for variation, options in VARIATIONS.items():
                if variation != "none" and title not in VARIED:
                    continue
                case = {"title": title, "variation": variation}
                try:
                    text, none = render(family["template"], special, messages, **options)
                    same, spans = render(tagged(family["template"]), special, messages, **options)
                    assert text == same and not none, (name, title, variation, text, same)
                    said = []
                    for begin, end in spans:
                        if said and said[-1][1] == begin:
                            said[-1][1] = end
                        else:
                            said.append([begin, end])
                    case.update(text=text, said=said)
                except AssertionError:
                    raise
                except Exception as error:  # jinja's own errors, and Python's for what a template does wrong
                    case["error"] = f"{type(error).__name__}: {error}"
                cases.append(case)
        rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
        head = json.dumps(family, ensure_ascii=False)
        (TARGET / f"{name}.json").write_text(f'{head[:-1]}, "cases": [\n{rows}\n]}}\n', encoding="utf-8")
        print(name, len(cases), "cases,", sum("text" in case for case in cases), "rendered")
    shared = {"now": NOW, "conversations": CONVERSATIONS, "variations": VARIATIONS}
    (TARGET / "shared.json").write_text(json.dumps(shared, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
