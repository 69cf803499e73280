"""Makes tests/fixtures/templates and tests/fixtures/tokenizer: what transformers renders and encodes, to compare with.

Run with transformers 5.17 installed:  python tests/python/chat_templates.py
Every template, conversation and training text here is our own; the templates use the constructs that published ones use.
"""

import json
import pathlib
import sys

from chat import CLOCK, NOW, WEATHER, assistant, freeze_clock, render, system, template, user
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"
TEMPLATES = FIXTURES / "templates"
TOKENIZER = FIXTURES / "tokenizer"

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}

# ---------------------------------------------------------------------------------------------- conversations

CALL = {"id": "abc123def", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2, "exact": True, "x": None}}}

CONVERSATIONS = {
    "one": [user("What is 2 + 2?")],
    "answered": [user("What is 2 + 2?"), assistant("4, of course.")],
    "system": [system("Be brief.\n"), user("  Hello there!  "), assistant("\nHi. \n")],
    "two turns": [user("One?"), assistant("Two."), user("Three?\n\nReally?"), assistant("Four: «четыре» 四 🙂")],
    "system two turns": [system("Sys"), user("One?"), assistant("Two."), user("Three?"), assistant("Four.")],
    "thinking": [
        user("Why?"),
        assistant("<think>\nFirst thought.\n</think>\n\nBecause."),
        user("And?"),
        assistant("<think>\nSecond.\n</think>\n\nThat is <b>all</b>."),
    ],
    "reasoning": [user("Why?"), assistant("Because.", reasoning_content="Let me\nsee."), user("And?"), assistant("So.", reasoning_content="Hm.")],
    "tool": [
        system("Use tools."),
        user("Weather in Köln?"),
        assistant("", tool_calls=[CALL]),
        {"role": "tool", "name": "weather", "tool_call_id": "abc123def", "content": '{"t": 21.5}'},
        assistant("It is 21.5 °C."),
    ],
    "tool null": [
        user("Weather?"),
        assistant(None, tool_calls=[CALL, CALL]),
        {"role": "tool", "name": "weather", "tool_call_id": "abc123def", "content": "rain"},
        {"role": "tool", "name": "weather", "tool_call_id": "abc123def", "content": "sun"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Part one. "}, {"type": "text", "text": "Part two."}]}, assistant([{"type": "text", "text": "Yes."}])],
    "assistant first": [assistant("I begin."), user("Then I follow.")],
    "two users": [user("One."), user("Two."), assistant("Three.")],
    "empty": [user(""), assistant("")],
}

# -------------------------------------------------------------------------------------------------- templates

TEMPLATE = {
    "headers and tools": template("llama-3"),
    "tools in xml": template("qwen-2.5"),
    "drops earlier thinking": template("qwen-3"),
    "inst with system last": template("mistral-v3"),
    "turns": template("gemma-3"),
}

TEMPLATE["chatml"] = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You answer as well as you can.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

TEMPLATE["generation"] = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '<tool_call>' ~ call.function | tojson ~ '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

TEMPLATE["generation without end"] = """{% for message in messages %}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}{% else %}{{ message.content }}{% endif %}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""

TEMPLATE["inst"] = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- " [INST] " + message["content"] + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

TEMPLATE["bars"] = """{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>
' + message['content'] + '<|end|>
' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>
' }}{% else %}{{ eos_token }}{% endif %}"""

TEMPLATE["thinks by itself"] = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='') %}{%- for message in messages %}{%- if message['role'] == 'system' %}{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor %}{{bos_token}}{{ns.system_prompt}}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|User|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls']%}{%- if not ns.is_first %}{{'<|Assistant|><|tool_calls_begin|>' + tool['type'] + '\\n' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments']|tojson + '\\n' + '```'}}{%- set ns.is_first = true -%}{%- else %}{{'\\n' + tool['function']['name']}}{{'<|end_of_sentence|>'}}{%- endif %}{%- endfor %}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}{{'<|tool_outputs_end|>' + message['content'] + '<|end_of_sentence|>'}}{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|Assistant|>' + content + '<|end_of_sentence|>'}}{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}{{'<|tool_outputs_begin|>' + message['content']}}{%- set ns.is_output_first = false %}{%- else %}{{'\\n' + message['content']}}{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<|tool_outputs_end|>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<|Assistant|><think>\\n'}}{% endif %}"""

TEMPLATE["macros and documents"] = """{%- macro json_type(spec) -%}
    {%- set basic = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} -%}
    {%- if spec.type is iterable and spec.type is not string -%}
        {{- "Union[" -}}
        {%- for t in spec.type -%}{{ json_type({"type": t}) }}{% if not loop.last %}{{ "," }}{% endif %}{%- endfor -%}
        {{- "]" -}}
    {%- elif basic[spec.type] is defined -%}
        {{- basic[spec.type] -}}
    {%- elif spec.type == "array" -%}
        {{- "List[" + json_type(spec['items']) + "]" -}}
    {%- elif spec.type == "object" -%}
        {{- "Dict[str, Any]" -}}
    {%- else -%}
        {{- "Any" -}}
    {%- endif -%}
{%- endmacro -%}
{%- macro document(doc, number=loop_number) -%}
Document: {{ number }}{% for key, value in doc.items() %}

{{ key|title }}: {{ value }}{% endfor %}
{%- endmacro -%}
{{ bos_token }}
{%- for tool in tools or [] %}
{%- set fn = tool.function -%}
def {{ fn.name }}(
{%- for name, spec in fn.parameters.properties.items() -%}
{{ name }}: {{ json_type(spec) }}
{%- if spec.default is defined %} = {{ spec.default }}{% endif %}
{%- if not loop.last %}, {% endif -%}
{%- endfor -%}
): # {{ fn.description }} required={{ fn.parameters.required }} {{ fn.parameters.properties.unit.enum if fn.parameters.properties.unit }}
{% endfor -%}
{%- for doc in documents or [] %}
{{ document(doc, loop.index) }}
{%- endfor %}
{%- for message in messages recursive %}
<{{ message.role|capitalize }}>{{ message.content }}</{{ message.role|upper }}>
{%- endfor %}
{% if add_generation_prompt -%} <Assistant> {%- endif -%}
"""

TEMPLATE["parts only"] = """{%- for message in messages -%}
{{ '<|im_start|>' ~ message.role ~ '\\n' -}}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

TEMPLATE["windows line ends"] = "{% for m in messages %}\r\n{{ m.role }}: {{ m.content }}\r\n{% endfor %}\r\nend\r\n"

VARIATIONS = [
    {},
    {"add_generation_prompt": True},
    {"tools": [WEATHER, CLOCK]},
    {"tools": [WEATHER], "add_generation_prompt": True, "variables": {"enable_thinking": False, "tools_in_user_message": False}},
    {"documents": [{"title": "One", "text": "First document."}, {"title": "Two", "text": "Second\n'quoted'"}], "variables": {"builtin_tools": ["code_interpreter", "weather"]}},
]

# ------------------------------------------------------------------------------------------------ expressions
# Small templates, one construct each; the context is the same for all.

CONTEXT = {
    "text": " Hello, World ",
    "word": "straße",
    "lines": "one\n\n  two\r\nthree\n",
    "markup": "<b>\"quoted\" & 'single'</b>",
    "yes": True,
    "no": False,
    "nothing": None,
    "number": 42,
    "negative": -7,
    "fraction": 0.1,
    "tiny": 1e-07,
    "large": 1e16,
    "whole": 3.0,
    "items": [3, 1, 2],
    "mixed": [1, 2.5, "three", None, True, [4, {"five": 6}], "it's", 'both \'"', "tab\tnewline\n\\ \u00a0 \u200b 🙂 é"],
    "mapping": {"b": 1, "a": [True, None], "c": {"d": "e'"}, "empty": {}, "none": []},
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "ha"}],
    "people": [{"name": "Bob", "age": 30}, {"name": "alice", "age": 25}, {"name": "Carol", "age": 35}],
    "format": "%s and %s",
}

EXPRESSIONS = r"""
{{ text }}|{{ yes }}|{{ no }}|{{ nothing }}|{{ number }}|{{ fraction }}|{{ tiny }}|{{ large }}|{{ whole }}|{{ missing }}|
{{ items }} {{ mixed }} {{ mapping }}
{{ (1, 'a') }} {{ (1,) }} {{ () }} {{ [] }} {{ {} }} {{ {'a': (1, 2)} }}
{{ mixed|tojson }}
{{ mapping|tojson(indent=2) }}
{{ mapping|tojson(sort_keys=true) }} {{ mapping|tojson(separators=(',', ':')) }}
{{ markup|tojson }} {{ word|tojson(ensure_ascii=true) }} {{ mixed|tojson(indent=4, ensure_ascii=True) }}
{{ [tiny, large, fraction, whole, number, 1e22, 123456789012345680.0, 1e-4, 0.00001]|tojson }}
{{ [tiny, large, fraction, whole, 1e22, 123456789012345680.0, 1e-4, 0.00001, -0.0, 1.5e300] }}
{{ [0.1 + 0.2, 100.0, 1e5, 12345.678, 1/3, 2/1] }}
{{ missing|tojson }}
{{ 'a' ~ 1 ~ none ~ true ~ 1.0 ~ [1, 'x'] ~ missing ~ {'k': none} }}
{{ 1 + 2 * 3 - 4 / 2 ** 2 // 1 % 5 }} {{ 7 // 2 }} {{ -7 // 2 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7 % -3 }} {{ 7.5 % 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }}
{{ 1 + 2 ~ 3 }}
{{ 'ab' * -1 }}| {{ [0] * -1 }} {{ (1, 'a') * 2 }} {{ 3 * ('x',) }}
{% for c in 'abc' %}{{ c }}{{ loop.last }}{{ loop.length }}{{ loop.revindex0 }} {% endfor %}{% for c in text.strip() %}{{ c if not loop.last }}{% endfor %}
{{ 'd' if mapping['items'] else 'e' }} {{ mapping['items'] is defined }} {{ mapping.values is defined }} {{ mapping['keys']['type'] == 'string' }} {{ mapping['get'] is callable }} {{ mapping['items'] is mapping }} {{ {'items': {'type': 'x'}}['items']['type'] }} {{ {'values': 3}['values'] + 1 }} {{ missing['items'] is defined }} {{ text['items'] is defined }} {{ mapping['items'].type is defined }}
{% set ns = namespace(items=[1]) %}{% set ns.items = ns.items + [2] %}{{ ns.items }}{{ ns.items|length }} {{ mapping.items()|list|length }} {{ mapping['items']()|list|length }} {{ (mapping.c or {}).get('d') }}
{{ "they're bill's 3rd".title() }} {{ "they're bill's 3rd"|title }}
{{ strftime_now('%c|%x|%X|%f|%Z%z|%%c|%d %B %Y|%A %j %U %y %I %p') }}
{{ 'ab' * 3 }} {{ [0] * 3 }} {{ 3 * 'x' }} {{ true + 1 }} {{ 1.5 + 1 }} {{ [1] + [2, 3] }} {{ (1,) + (2,) }}
{{ 'a' + 1 }}
{{ 'a' + none }}
{{ none + 'a' }}
{{ missing + 'a' }}
{{ missing.more }}
{{ missing['more'] }}
{{ nothing.more }}|{{ number.more }}|{{ text.more }}
{{ nothing.more.again }}
{{ '%s' % 'x' }} {{ '%d apples, %.2f each, %s' % (3, 1.5, none) }} {{ '%5s|%-5s|%05d|%x|%%|%r' % ('a', 'b', 42, 255, "q'") }} {{ format % ('one', [1, 'two']) }}
{{ '%s' % items }} {{ '%s' % true }} {{ '%s' % mapping.b }} {{ '%s %s' % ('a', none) }}
{{ '%s and %s'|format('x', 1) }} {{ '{} {} {0}'.format('a') }}
{{ '{} and {}'.format('x', none) }} {{ '{0}-{1}-{0}'.format(1, 2) }} {{ '{a}:{b:>5}'.format(a=1, b='z') }} {{ '{:.2f}'.format(3.14159) }}
{{ -number }} {{ +number }} {{ - 3|abs }} {{ (-3)|abs }} {{ not yes }} {{ not not yes }} {{ -negative ** 2 }}
{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 1 == 1.0 }} {{ true == 1 }} {{ 'a' < 'b' }} {{ [1, 2] == [1, 2] }} {{ (1, 2) == [1, 2] }} {{ none == missing }} {{ '1' == 1 }}
{{ 'ell' in text }} {{ 2 in items }} {{ 'b' in mapping }} {{ 'z' not in mapping }} {{ 1 in missing }} {{ 'x' in () }} {{ none in mixed }}
{{ 'a' in none }}
{{ 1 in 'abc' }}
{{ yes and 'x' or 'y' }} {{ no or nothing or 'last' }} {{ nothing and 1 }} {{ '' or none }} {{ 'x' if no }}|{{ 'x' if no else 'y' }} {{ 1 if yes else 2 if no else 3 }}
{{ text[1] }} {{ text[-2] }} {{ items[-1] }} {{ items[10] }}|{{ text[100] }}| {{ mapping['a'][0] }} {{ mapping.a.1 }} {{ items.0 }} {{ items[yes] }}
{{ items[1:] }} {{ items[:-1] }} {{ items[::-1] }} {{ items[::2] }} {{ items[-2:] }} {{ items[5:] }} {{ items[2:0:-1] }} {{ items[-1:-3:-1] }} {{ items[None:2] }} {{ text[1:6] }} {{ text[::-1] }} {{ text[:-3:2] }} {{ (1, 2, 3)[1:] }}
{{ items[::-1][0] }} {{ messages[::-1][0].content }} {{ messages[1:]|length }} {{ messages[:2][-1].role }}
{{ nothing[1:] }}
{{ missing[1:] }}
{{ mapping[1:] }}
{{ number[1:] }}
{{ text|length }} {{ items|length }} {{ mapping|count }} {{ missing|length }} {{ ''|length }} {{ '🙂é'|length }}
{{ none|length }}
{{ 5|length }}
{{ text|trim }}| {{ 'xxaxx'|trim('x') }} {{ missing|trim }}| {{ none|trim }} {{ "\x1f a \u00a0"|trim }}|
{{ text|upper }} {{ text|lower }} {{ 'hello wORLD-foo bar'|title }} {{ 'hELLO wORLD'|capitalize }} {{ none|upper }} {{ missing|lower }}|
{{ items|join(', ') }} {{ items|join }} {{ mixed|join('|') }} {{ people|join(', ', attribute='name') }} {{ missing|join }}| {{ 'abc'|join('-') }}
{{ items|first }} {{ items|last }} {{ text|first }}| {{ []|first }}| {{ missing|first }}| {{ missing|last }}
{{ items|sort }} {{ items|sort(reverse=true) }} {{ people|sort(attribute='age')|map(attribute='name')|list }} {{ ['b', 'A', 'c']|sort }} {{ ['b', 'A', 'c']|sort(case_sensitive=true) }}
{{ items|sum }} {{ people|sum(attribute='age') }} {{ items|min }} {{ items|max }} {{ items|reverse|list }} {{ 'abc'|reverse }}
{{ people|map(attribute='name')|join(',') }} {{ people|map('length')|list }} {{ ['a ', ' b']|map('trim')|list }} {{ people|map(attribute='none', default='d')|list }} {{ people|map(attribute='name')|map('upper')|list }}
{{ people|selectattr('age', 'gt', 26)|map(attribute='name')|list }} {{ people|rejectattr('name', 'equalto', 'Bob')|list|length }} {{ [1, 2, 3, 4]|select('odd')|list }} {{ [1, 2, 3, 4]|reject('divisibleby', 2)|list }} {{ mixed|select|list|length }} {{ people|selectattr('missing')|list }}
{{ people|selectattr('name', 'defined')|list|length }} {{ messages|selectattr('role', '==', 'user')|list|length }} {{ messages|selectattr('role', 'in', ['user'])|list|length }} {{ ['x', none]|select('none')|list }} {{ ['x', 1]|select('string')|list }}
{{ mapping|items|list }} {{ mapping.items()|list }} {{ mapping.keys()|list }} {{ mapping.values()|list }} {{ mapping|list }} {{ mapping|dictsort }} {{ missing|items|list }}
{{ mapping.get('b') }} {{ mapping.get('zz') }} {{ mapping.get('zz', 'dflt') }} {{ mapping|length }}
{{ [1, 1, 2, 'a', 'A']|unique|list }} {{ [1, 2, 3, 4, 5]|batch(2)|list }} {{ [1, 2, 3, 4, 5]|slice(2)|list }} {{ [1, 2, 3]|batch(2, 'x')|list }}
{% for group in people|groupby('age') %}{{ group.grouper }}:{{ group.list|length }} {% endfor %}{% for age, list in people|groupby('age') %}{{ age }}{% endfor %}
{{ missing|default('d') }} {{ none|default('d') }} {{ none|default('d', true) }} {{ ''|d('e', boolean=true) }} {{ missing|default }}| {{ 0|default(1, true) }}
{{ '3.7'|float }} {{ '42'|int }} {{ 'x'|int }} {{ 'x'|int(5) }} {{ 'x'|int(default=6) }} {{ 3.99|int }} {{ '0x1f'|int(base=16) }} {{ '3.9'|int }} {{ none|int }} {{ true|int }} {{ 'x'|float(1.5) }} {{ 5|float }}
{{ 2.5|round }} {{ 3.14159|round(2) }} {{ 3.14159|round(2, 'floor') }} {{ 3.14159|round(1, 'ceil') }} {{ 42|round }} {{ 3.7|round|int }} {{ -2.5|abs }}
{{ 'a b  c'.split() }} {{ 'a,b,c'.split(',') }} {{ 'a,b,c'.split(',', 1) }} {{ 'a,b,c'.rsplit(',', 1) }} {{ ''.split(',') }} {{ '  '.split() }} {{ 'a  b'.split(' ') }} {{ 'a b c'.split(none, 1) }} {{ 'a b c'.split(maxsplit=1) }} {{ 'x</think>y'.split('</think>')[-1] }}
{{ lines.splitlines() }} {{ lines.splitlines(true) }} {{ ''.splitlines() }} {{ 'a\x0bb\u2028c'.splitlines() }}
{{ 'a-b-c'.partition('-') }} {{ 'a-b-c'.rpartition('-') }} {{ 'abc'.partition('-') }} {{ 'abc'.rpartition('-') }}
{{ text.strip() }}| {{ text.lstrip() }}| {{ text.rstrip() }}| {{ 'xxaxx'.strip('x') }} {{ 'abcba'.lstrip('ab') }} {{ '\n\na\n'.strip('\n') }}
{{ 'hello'.startswith('he') }} {{ 'hello'.endswith(('lo', 'x')) }} {{ 'hello'.startswith('l', 2) }} {{ 'hello'.find('l') }} {{ 'hello'.rfind('l') }} {{ 'hello'.find('z') }} {{ 'hello'.index('l') }} {{ 'hello'.count('l') }} {{ 'hello'.find('l', 3) }} {{ 'éa'.find('a') }}
{{ 'hello'.index('z') }}
{{ 'hello'.replace('l', 'L') }} {{ 'hello'.replace('l', 'L', 1) }} {{ 'hello'|replace('l', 'L') }} {{ 'aaa'|replace('a', 'b', 2) }} {{ 'hello'.replace('', '-') }}
{{ 'Hello'.upper() }} {{ 'Hello'.lower() }} {{ 'hello world'.title() }} {{ 'hello'.capitalize() }} {{ 'Hello'.swapcase() }} {{ word.casefold() }} {{ word.upper() }}
{{ 'abc'.isalpha() }} {{ 'ab1'.isalnum() }} {{ '12'.isdigit() }} {{ ' '.isspace() }} {{ 'AB'.isupper() }} {{ 'ab'.islower() }} {{ ''.isdigit() }} {{ '12'.isnumeric() }} {{ '12'.isdecimal() }}
{{ 'a'.ljust(3) }}| {{ 'a'.rjust(3, '*') }} {{ 'ab'.center(5, '-') }} {{ 'abc'.center(6, '-') }} {{ '5'.zfill(3) }} {{ '-5'.zfill(4) }} {{ 'x'|center(5) }}|
{{ '-'.join(['a', 'b']) }} {{ ''.join(messages|map(attribute='role')) }} {{ 'prefix-a'.removeprefix('prefix-') }} {{ 'a.txt'.removesuffix('.txt') }}
{{ lines|indent }}| {{ lines|indent(2, true) }}| {{ 'a\nb'|indent(first=true) }} {{ 'a\nb'|indent('> ') }} {{ 'a\n\nb'|indent(2, blank=true) }}
{{ ('<a>'|safe) + '<b>' + "'c'" }} {{ '<x>' ~ ('<y>'|safe) ~ 1 }} {{ ('<'|e) + '&' }} {{ ('<'|e)|e }}
{{ 'one two three'|wordcount }} {{ markup|e }} {{ markup|escape }} {{ markup|safe }} {{ markup|string }} {{ 5|string + 'x' }} {{ none|string }} {{ 'x'|list }}
{{ text is string }} {{ number is string }} {{ items is sequence }} {{ text is sequence }} {{ mapping is sequence }} {{ nothing is sequence }} {{ missing is sequence }} {{ number is sequence }} {{ (1,) is sequence }}
{{ text is iterable }} {{ items is iterable }} {{ mapping is iterable }} {{ nothing is iterable }} {{ missing is iterable }} {{ number is iterable }} {{ yes is iterable }}
{{ text is mapping }} {{ mapping is mapping }} {{ items is mapping }} {{ number is number }} {{ yes is number }} {{ fraction is number }} {{ '1' is number }} {{ number is integer }} {{ yes is integer }} {{ whole is integer }} {{ whole is float }} {{ yes is boolean }} {{ 1 is boolean }} {{ raise_exception is callable }} {{ text is callable }}
{{ missing is defined }} {{ text is defined }} {{ nothing is defined }} {{ nothing is none }} {{ missing is none }} {{ missing is undefined }} {{ mapping.zz is defined }} {{ mapping.b is defined }} {{ yes is true }} {{ no is false }} {{ 1 is true }} {{ nothing is false }}
{{ 3 is odd }} {{ 3 is even }} {{ 6 is divisibleby 3 }} {{ 6 is divisibleby(4) }} {{ 'a' is in 'abc' }} {{ 1 is eq 1 }} {{ 'a' is sameas 'a' }} {{ none is sameas none }} {{ 'ab' is lower }} {{ 'AB' is upper }} {{ 2 is in items }} {{ 5 is gt 3 }} {{ 5 is not gt(3) }} {{ text is not string }} {{ not text is string }}
{% for i in range(3) %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.cycle('a', 'b') }} {% endfor %}
{% for i in items %}{{ loop.previtem if not loop.first }}-{{ loop.nextitem if not loop.last }} {{ loop.changed(i) }} {% else %}none{% endfor %}{% for i in [] %}x{% else %}empty{% endfor %}
{% for i in range(10) if i % 2 %}{% if i == 7 %}{% break %}{% endif %}{% if i == 3 %}{% continue %}{% endif %}{{ i }}{{ loop.index }} {% endfor %}
{% for key, value in mapping.items() %}{{ key }}={{ value }};{% endfor %}{% for key in mapping %}{{ key }}{% endfor %}{% for c in 'abc' %}{{ c }}.{% endfor %}{% for (a, b) in [(1, 2), [3, 4]] %}{{ a + b }}{% endfor %}
{% for x in missing %}x{% endfor %}|{% for x in none %}{% endfor %}
{% for x in 5 %}{% endfor %}
{% set x = 1 %}{% for i in [1, 2] %}{% set x = x + i %}{{ x }}{% endfor %}{{ x }} {% set ns = namespace(x=1, y=[]) %}{% for i in [1, 2] %}{% set ns.x = ns.x + i %}{% set ns.y = ns.y + [i] %}{% endfor %}{{ ns.x }}{{ ns.y }}{% if true %}{% set x = 9 %}{% endif %}{{ x }}
{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set c = (a, b) %}{{ c }}{% set d %}block {{ a }}{% endset %}[{{ d }}]{% set e | upper %}loud{% endset %}{{ e }}{% set f = 1, 2 %}{{ f }}
{% macro m(a, b='two', c=none) %}{{ a }}/{{ b }}/{{ c }}{% endmacro %}{{ m(1) }} {{ m(1, c='x') }} {{ m(b=3, a=4) }} {{ m() }}|{% macro outer(n) %}{% if n %}{{ n }}{{ outer(n - 1) }}{% endif %}{% endmacro %}{{ outer(3) }}
{% macro wrap(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>{% endmacro %}{% call wrap('i') %}in {{ number }}{% endcall %}{% filter upper %}shout {{ word }}{% endfilter %}{% with a=1, b=2 %}{{ a + b }}{% endwith %}{{ a }}
{% raw %}{{ raw }} {% if %}{% endraw %}{# comment {{ x }} #}{{ '{{' }} {{ "}}" }} {{ '{%' }}
{% if items %}a{% elif text %}b{% else %}c{% endif %}{% if '' %}a{% elif [] %}b{% elif {} %}c{% elif 0 %}d{% elif missing %}e{% else %}f{% endif %}
{{ "a" "b" 'c' }} {{ 'it''s' }} {{ "\x41\u00e9\n\t\\\"\'\/\d\101" }} {{ '\U0001F642' }} {{ 'line \
continued' }}
{{ 1_000 }} {{ 1.5e3 }} {{ 0x1F }} {{ 0b101 }} {{ 0o17 }} {{ 1e3 }} {{ 12345678901234567890 }}
{{ dict(a=1, b='x') }} {{ dict(mapping, z=1).z }} {{ range(5)|list }} {{ range(1, 10, 3)|list }} {{ range(5, 0, -2)|list }} {{ [1, 2, 3]|length + 1 }}
{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b{% set c = cycler('x', 'y') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}
{{ raise_exception('stop ' ~ number) }}
{{ unknown_function() }}
{{ text|unknown_filter }}
{{ text is unknown_test }}
{{ text.unknown_method() }}
{{ items.append(1) }}
{{ mapping.update({'z': 1}) }}
{{ 1 / 0 }}
{{ 1 % 0 }}
{{ (1, 2 }}
{% if %}x{% endif %}
{% if yes %}x
{% endfor %}
{{ 'open }}
{{ a b }}
{% for i in items recursive %}{{ i }}{% endfor %}{% for m in [{'v': 1, 'kids': [{'v': 2, 'kids': []}]}] recursive %}{{ m.v }}({{ loop(m.kids) }}){% endfor %}
{{ items|list|tojson }} {{ mapping.items()|list|tojson }} {{ {1: 'a', none: 'b', false: 'c'}|tojson }} {{ (1, 2)|tojson }} {{ ''|tojson }} {{ '\x7f\x00\u2028'|tojson }}
{{ text.strip().split(',')[0]|lower ~ '!' }} {{ (text|trim).split(', ')|last }} {{ text|trim|upper|replace('L', '')|length }}
{{ messages|map(attribute='content')|join(' ') }} {{ messages[0].content + messages[-1]['content'] }} {{ messages[loop_index|default(0)].role }}
{{ yes|string|lower }} {{ yes|lower }} {{ 3|string|int + 1 }} {{ [1, 'a']|string }} {{ fraction|string }} {{ mapping|string|length }}
{{ 'a' if text is defined and text is not none else 'b' }} {{ 'x' if not missing else 'y' }} {{ text is defined and text|length > 3 }} {{ (yes or no) and not nothing }}
{{ {'role': 'user', 'n': number}.role }} {{ {'a': 1}['a'] }} {{ {'a': 1}.get('b', {}).get('c', 'deep') }} {{ [[1, 2], [3]][0][1] }}
{{ text.__class__ }}
{{ (items|map('string')|list)[0] }} {{ items|map('string')|join }} {{ ['a', 'b']|map('upper')|first }}
{{ ['a', 'b', 'c'].index('b') }} {{ [1, 1, 2].count(1) }} {{ 'abc'[1:][0] }} {{ 'a\tb'.expandtabs(4) }}
{{ 5 // 0.3 }} {{ 5.5 // 2 }} {{ 10 ** 20 }} {{ -5 // -2 }} {{ 0.1 * 3 }} {{ 1e308 * 10 }} {{ 7 / 2 }} {{ 6 / 2 }} {{ 3 * 1.0 }} {{ 2 ** 0.5 }} {{ 2 ** 3 ** 2 }}
{{ strftime_now('%Y') | length }}
{%- if yes -%} tight {%- endif -%} x
""".strip("\n")


def expressions():
    """One template per line; a line that ends in a backslash goes on."""
    return EXPRESSIONS.replace("\\\n", "\\\u0000").split("\n")


LAYOUT = [
    "  {% if yes %}\n  indented\n  {% endif %}\n  after\n",
    "a {% if yes %} b\n{% endif %} c\n\n",
    "a\n  {%- if yes %}\n  b\n  {%- endif %}\nc",
    "a\n  {%+ if yes %}\n  b\n  {%+ endif +%}\nc\n",
    "a\n\t {# comment #}\n  b {# other #} c\n{#- tight -#}\n d",
    "{{ text }}\n\n{{ text }}\n",
    "{{- text -}}\n\n  {{- text }}\n",
    "{% for i in items %}\n{{ i }}\n{% endfor %}\n",
    "{% for i in items -%}\n  {{ i }},\n{%- endfor %}",
    "x\n{% raw %}\n {{ y }}\n{% endraw %}\nz",
    "x\n  {%- raw -%}  \n {{ y }}\n  {%- endraw -%}\nz",
    "{% set a = 1 %}\n{% set b = 2 %}\n\n{{ a }}{{ b }}",
    "\n\n{% if yes %}x{% endif %}\n\n",
    "A long piece of text that stands between two tags and has more than sixty-four characters.\n{% if yes %}\n  And another long piece of text, indented, that has \"quotes\" and \\backslashes\\ and more.\n  {% endif %}\n   tail that is also rather long, so that it is printed as an expression instead of text   \n",
    "{% macro m() %}\n  body\n{% endmacro %}\n[{{ m() }}]\n[{{- m() -}}]",
    "a{% if yes %}\n\n  b{% endif %}\n\n\nc   \n   ",
    "{{ 'x' }}   \n{% if no %}\n{% else %}\nelse\n{% endif %}",
]

# ------------------------------------------------------------------------------------------------- tokenizers

CORPUS = """The quick brown fox jumps over the lazy dog. A customer writes: my order has not arrived, and nobody answers the phone.
Please tell me what is wrong with the parcel. The answer is short and friendly; it names the next step and the day.
Assistant and user and system take turns. Assistant: Hello! How can I help you today? User: What is the capital of France? It is Paris.
In 2024 there were 12,345 rows and 678 columns; 9 of 10 tests passed. def add(a, b): return a + b
{"name": "weather", "arguments": {"city": "Paris", "days": 3}} {"category": "billing", "urgent": true, "summary": "charged twice"}
Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips did she sell altogether?
Natalia sold 48/2 = <<48/2=24>>24 clips in May. She sold 48+24 = <<48+24=72>>72 clips altogether in April and May. #### 72
Grüße aus Köln! Größe, Straße, Äpfel. Привет, как дела? Спасибо. 你好,世界。 こんにちは。 Olá, você está bem? ¿Qué tal? Ça va très bien.
First we think about it step by step, then we write the answer. The first step is to read the question; the second is to plan.
"""


def byte_tokenizer():
    """Byte-level BPE, like those of Llama 3, Qwen and SmolLM."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ["<think>", "</think>", "<tool_call>", "</tool_call>"]])
    return tokenizer


def piece_tokenizer():
    """BPE over pieces with byte fallback, like those of Llama 2, Mistral and Gemma; adds BOS."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", "<pad>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, limit_alphabet=120)
    # Learn merges within words only; the pre-tokenizer is not part of such tokenizers.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
    tokenizer.train_from_iterator(CORPUS.splitlines(), trainer)
    tokenizer.pre_tokenizer = None
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [token for token in saved["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(saved))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    return tokenizer


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def rendering(template, messages, **options):
    """What transformers renders, and the bytes it marks as generated; or that it refuses."""
    try:
        text, spans = render(template, SPECIAL, messages, **options)
    except Exception as error:  # jinja's own errors, and Python's for what a template does wrong
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text, **({"generation": spans} if spans else {})}


def renderings():
    freeze_clock()
    for name, template in TEMPLATE.items():
        cases = []
        for title, messages in CONVERSATIONS.items():
            for variation in VARIATIONS:
                if variation and title not in ("two turns", "system", "tool", "answered", "reasoning"):
                    continue
                cases.append({"title": title, **variation, **rendering(template, messages, **variation)})
        write(TEMPLATES / f"{name.replace(' ', '-')}.json", {"template": template, "cases": cases})
    write(TEMPLATES / "conversations.json", {"special_tokens": SPECIAL, "now": NOW, "conversations": CONVERSATIONS})

    small = []
    for template in [line.replace("\u0000", "\n") for line in expressions()] + LAYOUT:
        messages = CONTEXT["messages"]
        variables = {name: value for name, value in CONTEXT.items() if name != "messages"}
        small.append({"template": template, **rendering(template, messages, variables=variables)})
    write(TEMPLATES / "expressions.json", {"context": CONTEXT, "cases": small})


def encodings():
    """Token ids and assistant masks, by transformers' own apply_chat_template."""
    byte_level, pieces = byte_tokenizer(), piece_tokenizer()
    config = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    piece_config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    for name, tokenizer, special in [("bytes", byte_level, config), ("pieces", pieces, piece_config)]:
        path = TOKENIZER / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "tokenizer.json").write_text(tokenizer.to_str() + "\n", encoding="utf-8")
        write(path / "tokenizer_config.json", special)

    cases = []
    for name, special, templates in [
        ("bytes", config, ["chatml", "generation", "generation without end", "tools in xml", "drops earlier thinking", "bars"]),
        ("pieces", piece_config, ["inst", "inst with system last", "turns"]),
    ]:
        for template in templates:
            fast = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / name / "tokenizer.json"), chat_template=TEMPLATE[template], **special)
            for title, messages in CONVERSATIONS.items():
                try:
                    out = fast.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
                except Exception:
                    continue
                case = {"tokenizer": name, "template": template, "title": title, "ids": out["input_ids"]}
                if "generation %}" in TEMPLATE[template]:
                    case["mask"] = out["assistant_masks"]
                cases.append(case)
    texts = ["Hello, world!", " leading", "trailing ", "", "Größe 你好 🙂", "a\n\nb", "x" * 40, "12345 + 678", "<|im_end|>", "</s> in text"]
    plain = []
    for name, special in [("bytes", config), ("pieces", piece_config)]:
        fast = PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER / name / "tokenizer.json"), **special)
        for text in texts:
            ids = fast(text)["input_ids"]
            plain.append({
                "tokenizer": name, "text": text, "ids": ids,
                "plain": fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
                "decoded": fast.decode(ids), "shown": fast.decode(ids, skip_special_tokens=True),
            })  # fmt: skip
    target = TEMPLATES / "encodings.json"
    rows = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    texts = ",\n".join(json.dumps(case, ensure_ascii=False) for case in plain)
    target.write_text(f'{{"conversations": [\n{rows}\n], "texts": [\n{texts}\n]}}\n', encoding="utf-8")


if __name__ == "__main__":
    renderings()
    encodings()
    sys.exit(0)
