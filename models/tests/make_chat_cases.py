#!/usr/bin/env python3
"""Renders chat templates of real shapes with transformers and writes chat_cases.json, which chat.rs holds Volley against.

    pip install transformers==5.23.0 jinja2
    python make_chat_cases.py
"""

import json
import pathlib
from datetime import datetime

from transformers.utils.chat_template_utils import _compile_jinja_template

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

MIXTRAL = """{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, with the exception of an initial optional system message!') }}
    {%- endif %}
{%- endfor %}
"""

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
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
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

DBRX = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% elif 'system' not in messages[0]['role'] %}{% set loop_messages = messages %}"
    "{% set system_message = 'You are DBRX, created by Databricks. Current date: ' + strftime_now('%B %d, %Y') %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if loop.index0 == 0 %}"
    "{% if system_message != false %}{{ '<|im_start|>system' + '\n' + system_message | trim + '<|im_end|>' + '\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% else %}{{ '\n' + '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}{% endif %}"
    "{% if (add_generation_prompt == true and loop.last) %}{{ '\n' + '<|im_start|>' + 'assistant' + '\n' }}{% endif %}"
    "{% endfor %}"
)

# What else templates do: blocks on lines of their own, loop controls, the generation tag, macros, printed values.
QUIRKS = """{% macro tag(name) %}
<{{ name|upper }}>
{%- endmacro %}
{{ bos_token }}
  {% for m in messages %}
    {% if m.role == 'skip' %}
      {% continue %}
    {% endif %}
    {% if m.role == 'stop' %}{% break %}{% endif %}
  {{ tag(m.role) }}: {% generation %}{{ m.content|trim }}{% endgeneration %}
   {%- if not loop.last %} | {% endif %}

  {% endfor %}
{{ none }} {{ true }} {{ 1.0 }} {{ undefined_name }} {{ tools is none }} {{ 7 // 2 }} {{ 'a' ~ 1 }} {{ [1, 'x', none] }}
{{ {'b': 1, 'a': [true, 0.00001, 1e16]}|tojson }} {{ {'k': {'n': []}, 'e': 'é\\n"<'}|tojson(indent=2) }} {{ 'é'|tojson(ensure_ascii=true) }}
{{ messages|map(attribute='role')|join(',') }} {{ messages|selectattr('role', 'equalto', 'user')|list|length }} {{ (messages|last).content[:3] }}
{{ {'z': 1, 'y': 2}|tojson(sort_keys=true, separators=(',', ':')) }} {% for k, v in {'z': 1, 'y': 2}.items() %}{{ k }}={{ v }};{% endfor %}

"""

SYSTEM = {"role": "system", "content": "Be brief."}
HELLO = {"role": "user", "content": "Hello, you \u4f60\u597d <b>&</b>"}
ANSWER = {"role": "assistant", "content": "Hi!"}
MORE = {"role": "user", "content": "  And \"more\"?\n"}
THOUGHT = {"role": "assistant", "content": "<think>\nlet me see\n</think>\n\nHi there"}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather's <now>", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}}, "required": ["city"]}}}]
CALL = {"role": "assistant", "content": "", "tool_calls": [
    {"type": "function", "function": {"name": "weather", "arguments": {"city": "Z\u00fcrich", "days": 2}}},
    {"name": "weather", "arguments": "{\"city\": \"Bern\"}"}]}
RESULTS = [{"role": "tool", "content": "sunny"}, {"role": "tool", "content": "rain"}]


def case(name, template, messages, **variables):
    return {"name": name, "template": template, "messages": messages, "variables": variables}


CASES = [
    case("chatml", CHATML, [HELLO], add_generation_prompt=True),
    case("chatml with system", CHATML, [SYSTEM, HELLO, ANSWER, MORE], add_generation_prompt=False),
    case("mixtral", MIXTRAL, [HELLO, ANSWER, MORE], add_generation_prompt=True),
    case("mixtral with system", MIXTRAL, [SYSTEM, HELLO], add_generation_prompt=True),
    case("mixtral refuses", MIXTRAL, [HELLO, MORE]),
    case("mixtral refuses a tool", MIXTRAL, [HELLO, ANSWER, MORE, RESULTS[0]]),
    case("qwen3", QWEN3, [SYSTEM, HELLO, THOUGHT, MORE], add_generation_prompt=True),
    case("qwen3 without thinking", QWEN3, [HELLO], add_generation_prompt=True, enable_thinking=False),
    case("qwen3 prefix", QWEN3, [HELLO, THOUGHT]),
    case("qwen3 tools", QWEN3, [SYSTEM, HELLO], add_generation_prompt=True, tools=TOOLS),
    case("qwen3 tool calls", QWEN3, [HELLO, CALL, *RESULTS], add_generation_prompt=True, tools=TOOLS),
    case("qwen3 reasoning apart", QWEN3, [HELLO, ANSWER | {"reasoning_content": "\nhm\n"}]),
    case("dbrx", DBRX, [HELLO, ANSWER, MORE], add_generation_prompt=True),
    case("dbrx with system", DBRX, [SYSTEM, HELLO], add_generation_prompt=True),
    case("quirks", QUIRKS, [HELLO, {"role": "skip", "content": "x"}, MORE, ANSWER, {"role": "stop", "content": "abcdef"}]),
]


def main():
    for c in CASES:
        compiled = _compile_jinja_template(c["template"])
        compiled.globals["strftime_now"] = lambda format: datetime(2024, 3, 27, 9, 5).strftime(format)
        variables = {"bos_token": "<s>", "eos_token": "</s>", "tools": None, "documents": None,
                     "add_generation_prompt": False} | c["variables"]
        try:
            c["expected"] = compiled.render(messages=c["messages"], **variables)
        except Exception as error:
            c["refused"] = str(error)
    out = pathlib.Path(__file__).parent / "chat_cases.json"
    out.write_text(json.dumps(CASES, indent=1, ensure_ascii=False) + "\n")


main()
