"""Makes tests/fixtures/chat-families: chat templates of the constructs that the published ones of each family use.

Run with transformers 5.17 installed:  python tests/python/family_templates.py
Every template and conversation here is our own. `{#- said #}` and `{#- end said #}` stand around what the assistant says: as
comments they print nothing, as `{% generation %}` tags they tell from transformers itself what a mask must cover.
"""

import copy
import json
import pathlib
import re

from chat_templates import CLOCK, WEATHER, assistant, bytes_at, system, user
from transformers.utils import chat_template_utils

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

# -------------------------------------------------------------------------------------------------- templates

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"]
BRACKETS = ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[ARGS]"]  # fmt: skip
BARS = ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"]  # fmt: skip
MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

FAMILY = {}


def family(name, eos, special, template, bos=None, ends=(), plain=()):
    FAMILY[name] = {"eos": eos, "bos": bos, "ends": list(ends), "special": special, "plain": list(plain), "template": template}


family("llama-3", "<|eot_id|>", LLAMA, bos="<|begin_of_text|>", ends=["<|end_of_text|>", "<|eom_id|>"], template=r"""{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "1 May 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- What the system says is taken out first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set said_first = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set said_first = "" %}
{%- endif %}

{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Runs: ipython\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Has: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\n\n"}}
{%- endif %}
{{- "Known until: May 2024\n" }}
{{- "Date: " + date_string + "\n\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- 'Functions, to be called as {"name": ..., "parameters": ...}:\n\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{{- said_first }}
{{- "<|eot_id|>" }}

{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set question = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("No question to put the functions into.") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\n' -}}
    {{- "Answer with a call of one of these functions.\n\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
    {{- question + "<|eot_id|>"}}
{%- endif %}

{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {%- if message.role == 'assistant' %}
            {#- said #}
            {{- message['content'] | trim + '<|eot_id|>' }}
            {#- end said #}
        {%- else %}
            {{- message['content'] | trim + '<|eot_id|>' }}
        {%- endif %}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One call at a time.") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
        {#- said #}
        {%- if builtin_tools is defined and tool_call.name in builtin_tools %}
            {{- "<|python_tag|>" + tool_call.name + ".call(" }}
            {%- for name, value in tool_call.arguments | items %}
                {{- name + '="' + value | string + '"' }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- endif %}
                {%- endfor %}
            {{- ")" }}
        {%- else  %}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.arguments | tojson }}
            {{- "}" }}
        {%- endif %}
        {%- if builtin_tools is defined %}
            {{- "<|eom_id|>" }}
        {%- else %}
            {{- "<|eot_id|>" }}
        {%- endif %}
        {#- end said #}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
""")  # fmt: skip

family("llama-4", "<|eot|>", ["<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|python_start|>", "<|python_end|>", "<|image|>"], bos="<|begin_of_text|>", ends=["<|end_of_text|>", "<|eom|>"], template=r"""{%- macro typed(items) -%}
    {%- if items is iterable and items is not string -%}
        {%- set ok = namespace(value=true) -%}
        {%- for item in items -%}
            {%- if 'type' not in item -%}
                {%- set ok.value = false -%}
                {%- break -%}
            {%- endif -%}
        {%- endfor -%}
        {{ ok.value }}
    {%- else -%}
        {{ false }}
    {%- endif -%}
{%- endmacro %}
{%- macro body(message) %}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- elif typed(message['content']) == 'True' %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] | trim }}
            {%- endif %}
        {%- endfor %}
    {%- elif message['content'] is not none %}
        {{- message['content'] | tojson }}
    {%- endif %}
{%- endmacro %}
{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set first = messages[0]['content'] | trim %}
    {%- else %}
        {%- set first = messages[0]['content'][0]['text'] | trim %}
    {%- endif %}
    {%- set messages = messages[1:] %}
    {%- set given = true %}
{%- else %}
    {%- set first = ({"text": "You answer "
        'in few words.'}).text %}
    {%- set given = false %}
{%- endif %}
{%- if first or tools is not none %}
    {{- "<|header_start|>system<|header_end|>\n\n" }}
    {{- first if given or tools else '' }}
    {%- if tools is not none and not (tools_in_user_message | default(false)) %}
        {{- "\n" if first }}
        {%- for t in tools %}
            {{- t | tojson(indent=4) ~ "\n\n" }}
        {%- endfor %}
    {%- endif %}
    {{- "<|eot|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|header_start|>' + message['role'] + '<|header_end|>\n\n' }}
        {%- if message['role'] == 'assistant' %}
            {#- said #}{{- body(message) }}
            {{- "<|eot|>" }}{#- end said #}
        {%- else %}
            {{- body(message) }}
            {{- "<|eot|>" }}
        {%- endif %}
    {%- elif 'tool_calls' in message and message.tool_calls|length > 0 %}
        {{- '<|header_start|>assistant<|header_end|>\n\n' -}}
        {#- said #}
        {{- '<|python_start|>' }}
        {{- body(message) }}
        {{- '<|python_end|>' }}
        {%- for tool_call in message.tool_calls %}
            {{- '{"name": "' + tool_call.function.name + '", ' }}
            {{- '"parameters": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- "}" }}
        {%- endfor %}
        {{- "<|eot|>" }}
        {#- end said #}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|header_start|>ipython<|header_end|>\n\n" }}
        {{- message.content | tojson if message.content is mapping or message.content is iterable else message.content }}
        {{- "<|eom|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|header_start|>assistant<|header_end|>\n\n' }}
{%- endif %}
""")  # fmt: skip

family("qwen-2.5", "<|im_end|>", CHATML, ends=["<|endoftext|>"], plain=MARKUP, template=r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are at hand.' }}
    {%- endif %}
    {{- "\n\n# Functions\n\nWhat can be called, between <tools> and </tools>:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nA call looks like this:\n<tool_call>\n{\"name\": <name>, \"arguments\": <object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are at hand.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" and not message.tool_calls %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {#- said #}{{- message.content + '<|im_end|>' }}{#- end said #}
        {{- '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {#- said #}
        {%- if message.content %}
            {{- message.content + '\n' }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n' if not loop.first }}
            {{- '<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {#- end said #}
        {{- '\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
""")  # fmt: skip

family("qwen-3", "<|im_end|>", CHATML, ends=["<|endoftext|>"], plain=MARKUP, template=r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Functions\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {#- said #}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning)) %}
            {{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>' }}
        {#- end said #}
        {{- '\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}""")  # fmt: skip

family("qwen-3.5", "<|im_end|>", CHATML + ["<|image_pad|>"], ends=["<|endoftext|>"], plain=MARKUP, template=r"""{%- set pictures = namespace(value=0) %}
{%- macro body(content, counted, first=false) %}
    {%- if content is string %}
        {{- content }}
    {%- elif content is iterable and content is not mapping %}
        {%- for item in content %}
            {%- if 'image' in item or 'image_url' in item or item.type == 'image' %}
                {%- if first %}
                    {{- raise_exception('No pictures there.') }}
                {%- endif %}
                {%- if counted %}
                    {%- set pictures.value = pictures.value + 1 %}
                {%- endif %}
                {{- 'Picture ' ~ pictures.value ~ ': <|image_pad|>' }}
            {%- elif 'text' in item %}
                {{- item.text }}
            {%- else %}
                {{- raise_exception('What is this part?') }}
            {%- endif %}
        {%- endfor %}
    {%- elif content is none or content is undefined %}
        {{- '' }}
    {%- else %}
        {{- raise_exception('What is this content?') }}
    {%- endif %}
{%- endmacro %}
{%- if not messages %}
    {{- raise_exception('Nothing was said.') }}
{%- endif %}
{%- if tools and tools is iterable and tools is not mapping %}
    {{- '<|im_start|>system\n' }}
    {{- "# Functions\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nCall one so:\n\n<tool_call>\n<function=name>\n<parameter=its_name>\nvalue\n</parameter>\n</function>\n</tool_call>" }}
    {%- if messages[0].role == 'system' %}
        {%- set content = body(messages[0].content, false, true)|trim %}
        {%- if content %}
            {{- '\n\n' + content }}
        {%- endif %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {%- set content = body(messages[0].content, false, true)|trim %}
        {{- '<|im_start|>system\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(open=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.open and message.role == "user" %}
        {%- set content = body(message.content, false)|trim %}
        {%- if not(content.startswith('<tool_response>') and content.endswith('</tool_response>')) %}
            {%- set ns.open = false %}
            {%- set ns.last_query_index = index %}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if ns.open %}
    {{- raise_exception('No question was asked.') }}
{%- endif %}
{%- for message in messages %}
    {%- set content = body(message.content, true)|trim %}
    {%- if message.role == "system" %}
        {%- if not loop.first %}
            {{- raise_exception('The system speaks first.') }}
        {%- endif %}
    {%- elif message.role == "user" %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- set reasoning = reasoning|trim %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.index0 > ns.last_query_index %}
            {{- '<think>\n' }}
        {%- endif %}
        {#- said #}
        {%- if loop.index0 > ns.last_query_index %}
            {{- reasoning + '\n</think>\n\n' + content }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- if message.tool_calls and message.tool_calls is iterable and message.tool_calls is not mapping %}
            {%- for tool_call in message.tool_calls %}
                {%- if tool_call.function is defined %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {%- if loop.first %}
                    {%- if content|trim %}
                        {{- '\n\n<tool_call>\n<function=' + tool_call.name + '>\n' }}
                    {%- else %}
                        {{- '<tool_call>\n<function=' + tool_call.name + '>\n' }}
                    {%- endif %}
                {%- else %}
                    {{- '\n<tool_call>\n<function=' + tool_call.name + '>\n' }}
                {%- endif %}
                {%- if tool_call.arguments is mapping %}
                    {%- for name, value in tool_call.arguments|items %}
                        {{- '<parameter=' + name + '>\n' }}
                        {%- set value = value | tojson | safe if value is mapping or (value is sequence and value is not string) else value | string %}
                        {{- value }}
                        {{- '\n</parameter>\n' }}
                    {%- endfor %}
                {%- endif %}
                {{- '</function>\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>' }}
        {#- end said #}
        {{- '\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- content }}
        {{- '\n</tool_response>' }}
        {%- if not loop.last and loop.nextitem.role != "tool" %}
            {{- '<|im_end|>\n' }}
        {%- elif loop.last %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('Who is this?') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- else %}
        {{- '<think>\n' }}
    {%- endif %}
{%- endif %}""")  # fmt: skip

family("mistral-v3", "</s>", BRACKETS, bos="<s>", template=r"""{%- if messages[0]["role"] == "system" %}
    {%- set first = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- set questions = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Questions and answers take turns.") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == questions[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
            {%- endif %}
        {%- if loop.last and first is defined %}
            {{- "[INST] " + first + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {#- said #}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("An id has nine characters.") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
        {#- end said #}
    {%- elif message["role"] == "assistant" %}
        {#- said #}
        {{- " " + message["content"]|trim + eos_token}}
        {#- end said #}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("An id has nine characters.") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Who is this?") }}
    {%- endif %}
{%- endfor %}
""")  # fmt: skip

family("mistral-tekken", "</s>", BRACKETS, bos="<s>", template=r"""{%- set today = strftime_now("%Y-%m-%d") %}
{%- set usual = "You are at hand.\nToday is " + today + ".

Say when you do not know (\"I do not know\")." %}
{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages|length > 0 and messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set first = messages[0]['content'] %}
    {%- else %}
        {%- set first = messages[0]['content'][0]['text'] %}
    {%- endif %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set first = usual %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set questions = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.get('tool_calls'))) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Questions and answers take turns.") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- '[SYSTEM_PROMPT]' + first + '[/SYSTEM_PROMPT]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and (message == questions[-1]) %}
            {{- '[AVAILABLE_TOOLS]' + tools|tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST]' }}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- else %}
            {%- for block in message['content'] %}
                {%- if block['type'] == 'text' %}
                    {{- block['text'] }}
                {%- elif block['type'] in ['image', 'image_url'] %}
                    {{- '[IMG]' }}
                {%- else %}
                    {{- raise_exception('What is this part?') }}
                {%- endif %}
            {%- endfor %}
        {%- endif %}
        {{- '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {#- said #}
        {%- if message['content'] is string %}
            {{- message['content'] }}
        {%- elif message['content'] is iterable and message['content'] is not none %}
            {{- message['content'] | map(attribute='text') | join('') }}
        {%- endif %}
        {%- for tool_call in message.get('tool_calls', []) or [] %}
            {%- if not tool_call.id is defined or tool_call.id is not string or tool_call.id|length != 9 %}
                {{- raise_exception("An id has nine characters.") }}
            {%- endif %}
            {%- set arguments = tool_call.function.arguments if tool_call.function.arguments is string else tool_call.function.arguments|tojson|safe %}
            {{- '[TOOL_CALLS]' + tool_call['function']['name'] + '[ARGS]' + arguments }}
        {%- endfor %}
        {{- eos_token }}
        {#- end said #}
    {%- elif message['role'] in ('tool', 'tool_results') %}
        {{- '[TOOL_RESULTS]' + message.content|string + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception('Only ' ~ ['user', 'assistant', 'tool'] | join(', ') ~ ' speak, not ' ~ message['role'] ~ '.') }}
    {%- endif %}
{%- endfor %}""")  # fmt: skip

family("gemma-2", "<eos>", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], bos="<bos>", ends=["<end_of_turn>"], template=r"""{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('The system does not speak here.') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Questions and answers take turns.') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' }}{% if role == 'model' %}{# said #}{{ message['content'] | trim + '<end_of_turn>' }}{# end said #}{% else %}{{ message['content'] | trim + '<end_of_turn>' }}{% endif %}{{ '
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}""")  # fmt: skip

family("gemma-3", "<eos>", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"], bos="<bos>", ends=["<end_of_turn>"], template=r"""{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set before = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set before = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set before = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- macro body(content) -%}
    {%- if content is string -%}
        {{ content | trim }}
    {%- elif content is iterable -%}
        {%- for item in content -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("What is this content?") }}
    {%- endif -%}
{%- endmacro -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Questions and answers take turns.") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '
' + (before if loop.first else "") }}
    {%- if role == "model" -%}
        {#- said -#}
        {{ body(message['content']) }}
        {{- '<end_of_turn>' }}
        {#- end said -#}
    {%- else -%}
        {{ body(message['content']) ~ '<end_of_turn>' }}
    {%- endif -%}
    {{ '
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model
'}}
{%- endif -%}
""")  # fmt: skip

family("phi-3", "<|endoftext|>", BARS, ends=["<|end|>"], template=r"""{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'user' %}{{'<|user|>
' + message['content'] + '<|end|>
'}}{% elif message['role'] == 'assistant' %}{{'<|assistant|>
'}}{# said #}{{ message['content'] + '<|end|>'}}{# end said #}{{ '
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}""")  # fmt: skip

family("phi-4-mini", "<|endoftext|>", BARS, ends=["<|end|>"], template=r"""{%- set given = (messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list | first) | default('You help.', true) -%}
{{- '<|system|>' ~ given -}}
{%- if tools is not none and tools is defined -%}
{{- '<|tool|>' + tools | map(attribute='function') | list | tojson(separators=(',', ':')) + '<|/tool|>' -}}
{%- endif -%}
{{- '<|end|>' -}}
{%- for message in messages | rejectattr('role', 'equalto', 'system') -%}
{%- if message.role == 'user' -%}
{{- '<|user|>' ~ message.content ~ '<|end|>' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' -}}
{#- said -#}
{{- message.content if message.content is not none else '' -}}
{%- if message.tool_calls is defined and message.tool_calls -%}
{{- '<|tool_call|>[' -}}
{%- for tool_call in message.tool_calls -%}
{{- {'name': tool_call.function.name, 'arguments': tool_call.function.arguments} | tojson -}}
{{- '' if loop.last else ',' -}}
{%- endfor -%}
{{- ']<|/tool_call|>' -}}
{%- endif -%}
{{- '<|end|>' -}}
{#- end said -#}
{%- elif message.role == 'tool' -%}
{{- '<|tool_response|>%s: %s<|end|>' % (message.name | upper, message.content) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif -%}
""")  # fmt: skip

family("phi-4", "<|im_end|>", CHATML + ["<|im_sep|>"], ends=["<|endoftext|>"], template=r"""{% for message in messages %}{% if (message['role'] == 'system') %}{{'<|im_start|>system<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'user') %}{{'<|im_start|>user<|im_sep|>' + message['content'] + '<|im_end|>'}}{% elif (message['role'] == 'assistant') %}{{'<|im_start|>assistant<|im_sep|>'}}{# said #}{{ message['content'] + '<|im_end|>'}}{# end said #}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}""")  # fmt: skip

family("deepseek-v3", "<｜end▁of▁sentence｜>", ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>", "<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"], bos="<｜begin▁of▁sentence｜>", plain=["<think>", "</think>"], template=r"""{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\n\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<｜User｜>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and 'tool_calls' in message %}{%- set ns.is_tool = false -%}{%- set ns.is_first = false -%}{{'<｜Assistant｜>'}}{#- said #}{%- for tool in message['tool_calls'] %}{%- set arguments = tool['function']['arguments'] if tool['function']['arguments'] is string else tool['function']['arguments']|tojson %}{%- if not ns.is_first %}{{ (message['content'] or '') + '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + arguments + '\n' + '```' + '<｜tool▁call▁end｜>'}}{%- set ns.is_first = true -%}{%- else %}{{'\n' + '<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\n' + '```json' + '\n' + arguments + '\n' + '```' + '<｜tool▁call▁end｜>'}}{%- endif %}{%- endfor %}{{'<｜tool▁calls▁end｜><｜end▁of▁sentence｜>'}}{#- end said #}{%- endif %}{%- if message['role'] == 'assistant' and 'tool_calls' not in message %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{%- if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{#- said #}{{ content + '<｜end▁of▁sentence｜>'}}{#- end said #}{%- set ns.is_tool = false -%}{%- else %}{{'<｜Assistant｜>'}}{#- said #}{{ content + '<｜end▁of▁sentence｜>'}}{#- end said #}{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}{{'<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- set ns.is_output_first = false %}{%- else %}{{'<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>'}}{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<｜tool▁outputs▁end｜>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<｜Assistant｜>' ~ ('<think>\n' if not thinking else '')}}{% endif %}""")  # fmt: skip

family("smollm-2", "<|im_end|>", CHATML, ends=["<|endoftext|>"], template=r"""{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are at hand, and small.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
'}}{% if message['role'] == 'assistant' %}{# said #}{{ message['content'] + '<|im_end|>' }}{# end said #}{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""")  # fmt: skip

family("smollm-3", "<|im_end|>", CHATML, ends=["<|endoftext|>"], plain=MARKUP, template=r"""{# defaults #}
{%- if enable_thinking is not defined -%}
{%- set enable_thinking = true -%}
{%- endif -%}
{%- if enable_thinking -%}
{%- set mode = "/think" -%}
{%- else -%}
{%- set mode = "/no_think" -%}
{%- endif -%}

{{- "<|im_start|>system\n" -}}
{%- if messages[0].role == "system" -%}
  {%- set given = messages[0].content -%}
  {%- if "/no_think" in given -%}
    {%- set mode = "/no_think" -%}
  {%- elif "/think" in given -%}
    {%- set mode = "/think" -%}
  {%- endif -%}
  {%- set own = given.replace("/no_think", "").replace("/think", "").rstrip() -%}
{%- endif -%}

{%- if "/system_override" in given -%}
  {{- own.replace("/system_override", "").rstrip() -}}
  {{- "<|im_end|>\n" -}}
{%- else -%}
  {{- "## About\n\n" -}}
  {{- "Knows until: June 2025\n" -}}
  {%- set today = strftime_now("%d %B %Y") -%}
  {{- "Date: " ~ today ~ "\n" -}}
  {{- "Mode: " + mode + "\n\n" -}}
  {{- "## Wishes\n\n" -}}
  {%- if own -%}
    {{- own + "\n\n" -}}
  {%- elif mode == "/think" -%}
    {{- "Think between <think> and </think>, then answer.\n\n" -}}
  {%- else -%}
    {{- "Answer.\n\n" -}}
  {%- endif -%}
  {%- if xml_tools or python_tools or tools -%}
    {{- "### Tools\n\n" -}}
    {%- if xml_tools or tools -%}
      {%- if tools -%}
        {%- set xml_tools = tools -%}
      {%- endif -%}
      {%- set ns = namespace(listed="Call these as JSON in <tool_call></tool_call>:\n\n<tools>\n") -%}
      {%- for tool in xml_tools[:] -%}
        {%- set ns.listed = ns.listed ~ (tool | string) ~ "\n" -%}
      {%- endfor -%}
      {{- ns.listed + "</tools>" + "\n" -}}
    {%- endif -%}
    {%- if python_tools -%}
      {%- set ns = namespace(listed="Call these as Python in <code></code>:\n\n<tools>\n") -%}
      {%- for tool in python_tools[:] -%}
        {%- set ns.listed = ns.listed ~ (tool | string) ~ "\n" -%}
      {%- endfor -%}
      {{- ns.listed + "</tools>" -}}
    {%- endif -%}
    {{- "\n\n" -}}
    {{- "<|im_end|>\n" -}}
  {%- else -%}
    {{- "<|im_end|>\n" -}}
  {%- endif -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == "user" -%}
    {%- set content = message.content if message.content is string else message.content | map(attribute="text") | join -%}
    {{ "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" -%}
    {%- set content = message.content if message.content is string else "" -%}
    {%- set calls = message.tool_calls | default([], true) | map(attribute="function") | list -%}
    {{ "<|im_start|>assistant\n" }}
    {%- if mode == "/think" -%}
        {#- said -#}
        {{ content.lstrip("\n") }}
        {%- for made in calls -%}{{ "<tool_call>" ~ made | tojson ~ "</tool_call>" }}{%- endfor -%}
        {{ "<|im_end|>" }}
        {#- end said -#}
    {%- else -%}
        {{ "<think>\n\n</think>\n" }}
        {#- said -#}
        {{ content.lstrip("\n") }}
        {%- for made in calls -%}{{ "<tool_call>" ~ made | tojson ~ "</tool_call>" }}{%- endfor -%}
        {{ "<|im_end|>" }}
        {#- end said -#}
    {%- endif -%}
    {{ "\n" }}
    {%- elif message.role == "tool" -%}
    {{ "<|im_start|>" + "user\n"  + message.content | string + "<|im_end|>\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if mode == "/think" -%}
        {{ "<|im_start|>assistant\n" }}
    {%- else -%}
        {{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n" }}
    {%- endif -%}
{%- endif -%}
""")  # fmt: skip

family("gpt-oss", "<|return|>", ["<|startoftext|>", "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"], bos="<|startoftext|>", ends=["<|endoftext|>", "<|call|>"], template=r"""{#- Types as TypeScript has them #}
{%- macro typed(spec, required, nullable=false) -%}
    {%- if spec.type == "array" -%}
        {%- if spec['items'] -%}
            {%- if spec['items']['type'] in ["string", "boolean"] -%}
                {{- spec['items']['type'] ~ "[]" }}
            {%- elif spec['items']['type'] == "integer" -%}
                {{- "number[]" }}
            {%- else -%}
                {%- set inner = typed(spec['items'], required) -%}
                {%- if inner == "object | object" or inner|length > 50 -%}
                    {{- "any[]" }}
                {%- else -%}
                    {{- inner + "[]" }}
                {%- endif -%}
            {%- endif -%}
            {%- if spec.nullable -%}
                {{- " | null" }}
            {%- endif -%}
        {%- else -%}
            {{- "any[]" }}
        {%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type is not mapping and spec.type[0] is defined -%}
        {%- if spec.type | length > 1 -%}
            {{- spec.type | join(" | ") }}
        {%- else -%}
            {{- spec.type[0] }}
        {%- endif -%}
    {%- elif spec.oneOf -%}
        {%- for variant in spec.oneOf -%}
            {{- typed(variant, required) -}}
            {%- if variant.description %}
                {{- "// " + variant.description }}
            {%- endif -%}
            {%- if variant.default is defined %}
                {{ "// default: " + variant.default|tojson }}
            {%- endif -%}
            {%- if not loop.last %}
                {{- " | " }}
            {% endif -%}
        {%- endfor -%}
    {%- elif spec.type == "string" -%}
        {%- if spec.enum -%}
            {{- '"' + spec.enum|join('" | "') + '"' -}}
        {%- else -%}
            {{- "string" }}
        {%- endif -%}
    {%- elif spec.type == "number" or spec.type == "integer" -%}
        {{- "number" }}
    {%- elif spec.type == "boolean" -%}
        {{- "boolean" }}
    {%- elif spec.type == "object" -%}
        {%- if spec.properties -%}
            {{- "{\n" }}
            {%- for name, inner in spec.properties.items() -%}
                {{- name -}}
                {%- if name not in (spec.required or []) -%}
                    {{- "?" }}
                {%- endif -%}
                {{- ": " }}
                {{ typed(inner, spec.required or []) }}
                {%- if not loop.last -%}
                    {{-", " }}
                {%- endif -%}
            {%- endfor -%}
            {{- "}" }}
        {%- else -%}
            {{- "object" }}
        {%- endif -%}
    {%- else -%}
        {{- "any" }}
    {%- endif -%}
{%- endmacro -%}

{%- macro functions(space, tools) -%}
    {{- "## " + space + "\n\n" }}
    {{- "namespace " + space + " {\n\n" }}
    {%- for tool in tools %}
        {%- set tool = tool.function %}
        {{- "// " + tool.description + "\n" }}
        {{- "type "+ tool.name + " = " }}
        {%- if tool.parameters and tool.parameters.properties %}
            {{- "(_: {\n" }}
            {%- for name, spec in tool.parameters.properties.items() %}
                {%- if spec.description %}
                    {{- "// " + spec.description + "\n" }}
                {%- endif %}
                {{- name }}
                {%- if name not in (tool.parameters.required or []) -%}
                    {{- "?" }}
                {%- endif -%}
                {{- ": " }}
                {{- typed(spec, tool.parameters.required or []) }}
                {%- if spec.default is defined -%}
                    {%- if spec.enum %}
                        {{- ", // default: " + spec.default }}
                    {%- else %}
                        {{- ", // default: " + spec.default|tojson }}
                    {%- endif -%}
                {%- endif -%}
                {{- ",\n" }}
            {%- endfor %}
            {{- "}) => any;\n\n" }}
        {%- else -%}
            {{- "() => any;\n\n" }}
        {%- endif -%}
    {%- endfor %}
    {{- "} // namespace " + space }}
{%- endmacro -%}

{%- macro about() -%}
    {%- if model_identity is not defined %}
        {%- set model_identity = "You are at hand." %}
    {%- endif %}
    {{- model_identity + "\n" }}
    {{- "Date: " + strftime_now("%Y-%m-%d") + "\n\n" }}
    {%- if reasoning_effort is not defined %}
        {%- set reasoning_effort = "medium" %}
    {%- endif %}
    {{- "Reasoning: " + reasoning_effort + "\n\n" }}
    {%- if builtin_tools %}
        {{- "# Tools\n\n" }}
        {%- set has = namespace(browser=false, python=false) %}
        {%- for tool in builtin_tools %}
            {%- if tool == "browser" %}
                {%- set has.browser = true %}
            {%- elif tool == "python" %}
                {%- set has.python = true %}
            {%- endif %}
        {%- endfor %}
        {{- "browser: %s, python: %s\n\n" % (has.browser, has.python) }}
    {%- endif -%}
    {{- "# Channels: analysis, commentary, final." }}
    {%- if tools -%}
        {{- "\nFunctions are called in the commentary channel." }}
    {%- endif -%}
{%- endmacro -%}

{{- "<|start|>system<|message|>" }}
{{- about() }}
{{- "<|end|>" }}

{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {%- set developer = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer = "" %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if developer or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if developer %}
        {{- "# Wishes\n\n" }}
        {{- developer }}
        {{- "\n\n" }}
    {%- endif %}
    {%- if tools -%}
        {{- "# Tools\n\n" }}
        {{- functions("functions", tools) }}
    {%- endif -%}
    {{- "<|end|>" }}
{%- endif %}

{%- set called = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "content" in message and message.content and ("<|channel|>analysis<|message|>" in message.content or "<|channel|>final<|message|>" in message.content) %}
            {{- raise_exception("Thoughts go into the thinking field.") }}
        {%- endif %}
        {%- if "tool_calls" in message %}
            {%- set later = namespace(found=false) %}
            {%- for other in loop_messages[loop.index:] %}
                {%- if other.role == 'assistant' and "tool_calls" not in other %}
                    {%- set later.found = true %}
                {%- endif %}
            {%- endfor %}
            {%- set tool_call = message.tool_calls[0] %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- "<|start|>assistant" }}
            {#- said #}
            {%- if message.content and message.thinking %}
                {{- raise_exception("Either content or thinking.") }}
            {%- elif message.content and not later.found %}
                {{- "<|channel|>analysis<|message|>" + message.content + "<|end|><|start|>assistant" }}
            {%- elif message.thinking and not later.found %}
                {{- "<|channel|>analysis<|message|>" + message.thinking + "<|end|><|start|>assistant" }}
            {%- endif %}
            {{- " to=functions." + tool_call.name + "<|channel|>commentary " }}
            {{- (tool_call.content_type if tool_call.content_type is defined else "json") + "<|message|>" }}
            {{- tool_call.arguments|tojson }}
            {{- "<|call|>" }}
            {#- end said #}
            {%- set called.name = tool_call.name %}
        {%- elif loop.last and not add_generation_prompt %}
            {{- "<|start|>assistant" }}
            {#- said #}
            {%- if "thinking" in message %}
                {{- "<|channel|>analysis<|message|>" + message.thinking + "<|end|><|start|>assistant" }}
            {%- endif %}
            {{- "<|channel|>final<|message|>" + message.content + "<|return|>" }}
            {#- end said #}
        {%- else %}
            {{- "<|start|>assistant" }}
            {#- said #}{{- "<|channel|>final<|message|>" + message.content + "<|end|>" }}{#- end said #}
            {%- set called.name = none %}
        {%- endif %}
    {%- elif message.role == 'tool' -%}
        {%- if called.name is none %}
            {{- raise_exception("Nothing was called.") }}
        {%- endif %}
        {{- "<|start|>functions." + called.name }}
        {{- " to=assistant<|channel|>commentary<|message|>" + message.content|tojson + "<|end|>" }}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}""")  # fmt: skip

family("glm-4", "<|endoftext|>", ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], ends=["<|user|>", "<|observation|>"], template=r"""[gMASK]<sop>
{%- if tools -%}
<|system|>
{{ 'Functions:' }}
{%- for tool in tools -%}
{%- if 'function' in tool -%}{%- set tool = tool.function -%}{%- endif %}


## {{ tool.name }}

{{ tool | tojson(indent=4, ensure_ascii=True) }}
{%- endfor -%}
{%- endif -%}
{%- for message in messages %}
{%- set answered = loop.previtem is defined and loop.previtem.role == 'assistant' %}
{%- if message.role == 'system' %}
{{- '<|system|>\n' ~ message.content }}
{%- elif message.role == 'user' %}
{%- if answered %}{#- said #}{{- '<|user|>' }}{#- end said #}{%- else %}{{- '<|user|>' }}{%- endif %}
{{- '\n' ~ (message.content if message.content is string else message.content | map(attribute='text') | join) }}
{%- elif message.role == 'tool' %}
{%- if answered %}{#- said #}{{- '<|observation|>' }}{#- end said #}{%- else %}{{- '<|observation|>' }}{%- endif %}
{{- '\n' ~ message.content }}
{%- elif message.role == 'assistant' %}
{{- '<|assistant|>' }}
{#- said #}
{%- if message.tool_calls %}
{%- for made in message.tool_calls | map(attribute='function') %}
{{- made.name ~ '\n' ~ (made.arguments if made.arguments is string else made.arguments | tojson) }}
{%- endfor %}
{%- else %}
{{- '\n' ~ (message.content if message.content is string else message.content | map(attribute='text') | join) }}
{%- endif %}
{#- end said #}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
""")  # fmt: skip

family("glm-4.5", "<|endoftext|>", ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"], ends=["<|user|>", "<|observation|>"], plain=MARKUP, template=r"""[gMASK]<sop>
{%- if tools -%}
<|system|>
# Functions

<tools>
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
</tools>
{%- endif -%}
{%- macro visible(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}
                {{- item.text }}
            {%- elif item is string -%}
                {{- item }}
            {%- endif -%}
        {%- endfor -%}
    {%- elif content is none -%}
    {%- else -%}
        {{- content }}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user_index=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {% set ns.last_user_index = loop.index0 -%}
    {%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}
{%- if not loop.first and messages[loop.index0 - 1].role == 'assistant' -%}{#- said #}<|user|>{#- end said #}{%- else -%}<|user|>{%- endif %}
{{- '\n' ~ visible(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking and not visible(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning = '' %}
{%- set content = visible(m.content) %}
{%- if m.reasoning_content is string %}
    {%- set reasoning = m.reasoning_content %}
{%- else %}
    {%- if '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
{%- endif %}
{#- said #}
{%- if loop.index0 > ns.last_user_index and reasoning -%}
{{ '\n<think>' + reasoning.strip() +  '</think>'}}
{%- else -%}
{{ '\n<think></think>' }}
{%- endif -%}
{%- if content.strip() -%}
{{ '\n' + content.strip() }}
{%- endif -%}
{% if m.tool_calls %}
{% for tc in m.tool_calls %}
{%- if tc.function %}
    {%- set tc = tc.function %}
{%- endif %}
{{ '\n<tool_call>' + tc.name }}
{% set _args = tc.arguments %}
{% for k, v in _args.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}
{% endif %}
{#- end said #}
{%- elif m.role == 'tool' -%}
{%- if m.content is string -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{#- said #}{{- '<|observation|>' }}{#- end said #}{%- endif %}
{{- '\n<tool_response>\n' }}
{{- m.content }}
{{- '\n</tool_response>' }}
{%- else -%}
<|observation|>{% for tr in m.content %}

<tool_response>
{{ tr.output if tr.output is defined else tr }}
</tool_response>{% endfor -%}
{% endif -%}
{%- elif m.role == 'system' -%}
<|system|>
{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}""")  # fmt: skip

# --------------------------------------------------------------------------------------------------- rendering


def tagged(template):
    """The template with generation tags where it says who speaks."""
    template = re.sub(r"\{#(-?) said (-?)#\}", r"{%\1 generation \2%}", template)
    return re.sub(r"\{#(-?) end said (-?)#\}", r"{%\1 endgeneration \2%}", template)


def render(template, special, messages, tools=None, add_generation_prompt=False, variables=None):
    rendered, spans = chat_template_utils.render_jinja_template(
        [copy.deepcopy(messages)], tools=copy.deepcopy(tools), chat_template=template, return_assistant_tokens_mask=True,
        add_generation_prompt=add_generation_prompt, **special, **(variables or {}),
    )  # fmt: skip
    return rendered[0], spans[0]


def main():
    class Frozen(chat_template_utils.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2025, 3, 9, 8, 5, 0)

    chat_template_utils.datetime = Frozen
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
                    for begin, end in sorted((bytes_at(text, begin), bytes_at(text, end)) for begin, end in spans):
                        if said and said[-1][1] == begin:
                            said[-1][1] = end
                        elif end > begin:
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
    shared = {"now": "2025-03-09T08:05:00", "conversations": CONVERSATIONS, "variations": VARIATIONS}
    (TARGET / "shared.json").write_text(json.dumps(shared, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
