"""Chats are rendered as transformers renders them, by templates that use what models' templates use."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from relevo.chat_template import render

PLAIN = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "  Grüße, 世界 👩‍🚀!\n"},
    {"role": "assistant", "content": "hello", "reasoning": "they greet"},
    {"role": "user", "content": "again"},
]
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Köln", "days": 2}}}
WITH_TOOLS = [
    {"role": "user", "content": [{"type": "text", "text": "rain?"}, {"type": "text", "text": "  and sun?"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
    {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": '{"mm": 1.5}'},
    {"role": "assistant", "content": "It rains.", "thinking": "1.5 mm", "weight": 0.5, "done": True},
]
CHATS: dict[str, list[Any]] = {"plain": PLAIN, "tools": WITH_TOOLS}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "<Wetter> in 'Städten'", "parameters": {"required": ["city"]}},
    }
]
VARIABLES: dict[str, Any] = {
    "tools": TOOLS,
    "documents": [{"title": "A", "text": "first"}, {"title": "B", "text": "second"}],
    "add_generation_prompt": True,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "enable_thinking": False,
    "nothing": None,
}

TEMPLATES = {
    "chatml": """{% for m in messages %}
    <|im_start|>{{ m.role }}
{{ m['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '\\n<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{% endif %}""",
    "system first": """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
  {%- set system, rest = messages[0]['content'] | trim, messages[1:] -%}
{%- else -%}{%- set system, rest = '', messages -%}{%- endif -%}
{%- for m in rest -%}[{{ loop.index0 }}/{{ loop.length }}]{{ '\\n' ~ system if loop.first and system }}
{%- if m.content is string %}{{ m.content.strip() }}{% else %}
{%- for part in m.content %}{{ part.text }}{% endfor %}{% endif -%}
{{ eos_token if loop.last }}{%- endfor -%}""",
    "tools as JSON": """{%- if tools %}# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{{ tool.function | tojson(indent=2) }}
{{ tool | tojson(separators=(',', ':'), sort_keys=true) }}{{ tool | tojson(ensure_ascii=true) }}
{%- endfor %}{% endif %}
{%- for m in messages %}{%- if m.tool_calls %}{%- for call in m.tool_calls -%}
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
{%- for key, value in call['function']['arguments'].items() %}<{{ key }}>{{ value }}</{{ key }}>{% endfor %}
{%- endfor %}{%- endif %}{%- endfor %}""",
    "namespace": """{%- set ns = namespace(last=-1, calls=0, text='') %}
{%- for m in messages[::-1] %}
  {%- set index = (messages | length - 1) - loop.index0 %}
  {%- if ns.last < 0 and m.role == 'user' %}{% set ns.last = index %}{% endif %}
  {%- set ns.calls = ns.calls + (m.tool_calls | default([]) | length) %}
{%- endfor %}{{ ns.last }} {{ ns.calls }} {{ ns.text }}{{ namespace({'a': 1}, self=2).self }}""",
    "loop controls": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{{ m.role }}{% if m.role == 'assistant' %}{% break %}{% endif %}{% endfor %}""",
    "generation": """{% set who = 'x' %}{% for m in messages %}{% if m.role == 'assistant' %}
    {% generation %}
    {% set who = m.role %}
{{ m.content }}{{ who }}{{ eos_token }}
    {%- endgeneration %}{% else %}{{ m.role }}{% endif %}{% endfor %}{{ who }}""",
    "reasoning": """{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }};{% endfor %}""",
    "macros": """{%- macro show(m, depth=1) -%}{{ '>' * depth }}{{ m.role | upper }}{%- endmacro -%}
{% for m in messages %}{{ show(m) }}{{ show(m, depth=2) }}{% endfor %}
{% macro twice() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call twice() %}x{% endcall %}""",
    "filters": """{{ messages | map(attribute='role') | join(',') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
{{ messages[-1].content | replace('a', 'b') | title }}
{{ messages | rejectattr('tool_calls', 'defined') | map(attribute='role') | unique | list }}
{{ dict(a=1, **{'b': 2}) | tojson }} {{ dict.fromkeys(['a']) }}
{{ dict([('x', 1)]).get('y', 'z') }} {{ 'ab'.startswith(('a', 'c')) }}
{{ 7 // 2 }} {{ 1.5 | round | int }} {{ nothing }} {{ missing }} {{ missing is defined }}
{{ [1, 2][::-1] }} {{ range(3) | list }}""",
    "documents": """{% for d in documents %}
Document {{ loop.index }}: {{ d['title'] }}
{{ d.text | indent(2) }}
{% endfor %}{# a comment #}
{{- '%s-%s' | format('a', 'b') }}{{ "a" "b" }}""",
    "white space": "  {% if true %}\n  x  \n  {%- endif %}\n\n  {% raw %}{{ y }}{% endraw %}\n"
    "{%+ if true +%}\n z{% endif %}\n",
    "today": "{{ strftime_now('%Y-%m') }}",
    "printed values": "{{ messages }}{{ tools }}{{ documents }}{{ 1 == 1.0 }}{{ none }}",
}
REFUSED = {
    "raises": "{{ raise_exception('roles must alternate') }}",
    "escapes": "{{ ''.__class__.__mro__ }}",
    "changes": "{{ messages.append(1) }}",
    "namespace keeps no secrets": "{{ namespace(_x=1) }}",
    "namespace gets none": "{% set n = namespace() %}{% set n._x = 1 %}",
    "is none": "{% for m in messages %}",
    "adds text and numbers": "{{ messages[0].role + 1 }}",
    "calls what is not there": "{{ missing.field }}",
    "divides": "{{ 1 / 0 }}",
    "no JSON": "{{ missing | tojson }}",
}


def theirs(template: str, chat: list[Any], variables: dict[str, Any]) -> str:
    without_none = [{key: value for key, value in message.items() if value is not None} for message in chat]
    text: str = render_jinja_template([without_none], chat_template=template, **variables)[0][0]
    return text


@pytest.mark.parametrize("chat", sorted(CHATS))
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_texts_equal_transformers(name: str, chat: str) -> None:
    without: dict[str, Any] = {"tools": None, "documents": [], "add_generation_prompt": False}
    for variables in (VARIABLES, without):
        expected = theirs(TEMPLATES[name], CHATS[chat], variables)
        assert render(TEMPLATES[name], CHATS[chat], **variables) == expected


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_transformers_refuses_is_refused_for_the_same_reason(name: str) -> None:
    with pytest.raises((jinja2.TemplateError, TypeError, ArithmeticError)) as expected:
        theirs(REFUSED[name], PLAIN, VARIABLES)
    with pytest.raises(expected.type):
        render(REFUSED[name], PLAIN, **VARIABLES)


def test_a_template_sees_plain_values_only() -> None:
    """Of an object of another kind it sees the kind, of a string of another class the string."""

    class Loud(str):
        def __str__(self) -> str:
            return self.upper()

    chat: list[Any] = [{"role": Loud("red"), "content": object(), "size": (1, True, 2.5)}]
    template = "{{ messages[0].role }}{{ messages[0].content }}{{ messages[0].size }}"
    expected = "red<object>(1, True, 2.5)"
    assert render(template, chat) == theirs(template, chat, {}) == expected


def test_messages_stay_as_they_were() -> None:
    chat = [{"role": "user", "content": "x", "reasoning": "y"}]
    assert render("{{ messages[0].thinking }}", chat) == "y"
    assert chat == [{"role": "user", "content": "x", "reasoning": "y"}]


def test_a_refusal_says_what_the_template_said() -> None:
    with pytest.raises(jinja2.TemplateError, match="roles must alternate"):
        render(REFUSED["raises"], PLAIN)


def test_neither_transformers_nor_numpy_is_imported() -> None:
    script = (
        "import sys; from relevo.chat_template import render\n"
        "render('{{ messages | tojson }}', [{'role': 'user', 'content': 'hi'}])\n"
        "sys.exit(' '.join({'transformers', 'numpy', 'huggingface_hub'} & sys.modules.keys()) or None)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
