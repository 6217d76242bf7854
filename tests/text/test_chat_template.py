"""Conversations against Transformers' own rendering, and templates that ask for too much."""

from __future__ import annotations

import dataclasses
import enum
import re

import numpy as np
import pico
import pytest

from depthprune_runtime import InputError, Runtime
from depthprune_runtime.text.chat_template import ChatTemplate

CHAT_ML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCT = """{{ bos_token }}{% for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{%- if message['role'] == 'user' %}
    {{- '[INST] ' + message['content'].strip() + ' [/INST]' }}
{%- else %}{% generation %}
    {{- message['content'] | trim + eos_token -}}
{% endgeneration %}{% endif %}
{% endfor %}"""
TOOLS = """{%- macro text(content) %}
    {%- if content is string %}{{ content }}
    {%- else %}{% for part in content %}{{ part.text }}{{ '|' if not loop.last }}{% endfor %}{% endif %}
{%- endmacro %}
{%- set ns = namespace(calls=0, names=[], last=messages|length - 1) %}
{%- if tools %}{% for tool in tools %}{{ tool | tojson(indent=2) }}
{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'developer' %}{% continue %}{% endif %}
    {%- set head = '<' ~ message.role ~ ' ' ~ (loop.index0 + 1) ~ '>' %}
    {{- head + text(message.content) if message.content is defined else head }}
    {%- for call in message.tool_calls or [] %}
        {%- set ns.calls = ns.calls + 1 %}{% set ns.names = ns.names + [call.function.name] %}
        {{- '<call>' + call.function | tojson + '</call>' }}
    {%- endfor %}
    {%- if message.reasoning_content %}<think>{{ message['reasoning_content'][:5] }}</think>{% endif %}
{%- endfor %}
{{- ns.calls }}{{ ns.names | join(', ') | upper }}
{{- "%s-%05.1f" | format('x', 2.5) }}{{ '%d%% of 2024 %%5000d' % 5 }}{{ 'a{}b'.format(1) }}
{%- for key, value in (documents or [{}])[0] | dictsort %}{{ key }}={{ value }};{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %}<no think>{% endif %}
{%- set groups = messages | map(attribute='role') | unique | list %}{{ groups }}{{ [1, 2] * 2 }}{{ 2 ** 10 }}
{%- if add_generation_prompt %}<assistant>{% endif %}"""

USER = {"role": "user", "content": " Hi <b>\n"}
ANSWER = {"role": "assistant", "content": "Hello "}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": [1, "é"]}}}
SCHEMA = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


class Role(str, enum.Enum):
    USER = "user"


@dataclasses.dataclass
class Message:
    role: str
    content: str


CASES = [
    (CHAT_ML, [USER], {}),
    (CHAT_ML, [{"role": "system", "content": ""}, USER, ANSWER, USER], {}),
    (CHAT_ML, [USER, ANSWER], {"continue_final_message": True}),
    (CHAT_ML, [USER, ANSWER], {"add_generation_prompt": False}),
    (CHAT_ML, [Message("user", "x"), {"role": Role.USER, "content": "y"}], {}),
    (INSTRUCT, [USER, ANSWER, USER], {}),
    (INSTRUCT, [USER, ANSWER], {"continue_final_message": True}),
    (TOOLS, [USER, {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}, USER], {"tools": [SCHEMA]}),
    (TOOLS, [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "7"}], {}),
    (TOOLS, [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], {}),
    (TOOLS, [{"role": "user", "content": [{"type": "text", "text": "a"}]}], {"continue_final_message": True}),
    (TOOLS, [USER, {**ANSWER, "reasoning": "because so"}, {"role": "developer", "content": "x"}], {}),
    (TOOLS, [USER], {"documents": [{"title": "t", "text": np.float64(2.5)}]}),
    (TOOLS, [USER], {"chat_template_kwargs": {"enable_thinking": False}}),
]


@pytest.mark.parametrize(("template", "messages", "options"), CASES)
def test_prompts_equal_transformers(template, messages, options):
    theirs = pico.build_tokenizer()
    theirs.chat_template = template
    known = {"add_generation_prompt": not options.get("continue_final_message"), **options}
    variables = known.pop("chat_template_kwargs", {})
    expected = theirs.apply_chat_template(messages, tokenize=False, **known, **variables)
    special = {name: text for name, text in theirs.special_tokens_map.items() if isinstance(text, str)}
    assert ChatTemplate({"default": template}, special).render(messages, **options).text == expected


def rendered(template, messages=(USER,), **options):
    return ChatTemplate({"default": template}, {}).render(list(messages), **options).text


def test_parts_become_one_text_where_a_template_knows_no_parts():
    parts = [{"type": "text", "text": "a"}, "b"]
    assert rendered("{{ messages[0].content + '!' }}", [{"role": "user", "content": parts}]) == "a\nb!"
    lines = "{% for line in messages[0].content.split('\\n') %}[{{ line }}]{% endfor %}"
    assert rendered(lines, [{"role": "user", "content": parts}]) == "[a][b]"


def test_arguments_of_a_call_may_be_json_text_as_openai_has_them():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert rendered(template, [message]) == '{"x": 1}'
    call["function"]["arguments"] = "no JSON"
    assert rendered(template, [message]) == '"no JSON"'
    assert call["function"]["arguments"] == "no JSON"  # the caller's messages stay as they are


def test_named_templates():
    named = ChatTemplate({"default": "d{{ x }}", "tool_use": "t", "rag": "r"}, {})
    messages = [USER]
    assert named.render(messages).text == "d"
    assert named.render(messages, tools=[SCHEMA]).text == "t"
    assert named.render(messages, tools=[]).text == "d"
    assert named.render(messages, chat_template="rag").text == "r"
    assert named.render(messages, chat_template="own {{ messages|length }}").text == "own 1"
    with pytest.raises(InputError, match=r"none that is the default; name one of \['rag'\]"):
        ChatTemplate({"rag": "r"}, {}).render(messages)


TOO_MUCH = {
    "a power": "{{ 2**(10**9) }}",
    "a power of a power": "{{ (2**1000)**1000 }}",
    "a product": "{{ 'x' * 10**9 }}",
    "a product of lists": "{{ [1] * 10**9 }}",
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for a in range(100000) %}{% for b in range(100000) if 0 %}{% endfor %}{% endfor %}",
    "text of the template": "{% for a in range(100000) %}" + "x" * 10_000 + "{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "lists of lists": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}",
    "dicts of dicts": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = {1: n.x, 2: n.x} %}{%endfor%}",
    "namespaces": "{% set n = namespace(x=1) %}{% set n.x = n %}{{ n }}",
    "a namespace in a list": "{% set n = namespace(x=1) %}{% set n.x = [n] %}{{ n }}",
    "padding": "{{ 'a'.center(10**9) }}",
    "a filter's padding": "{{ 'a' | center(10**9) }}",
    "mapped padding": "{{ range(9) | map('center', 10**9) | list }}",
    "indentation": "{{ 'a\n' | indent(10**9) }}",
    "a text as indentation": "{{ ('\n' * 100000) | indent('x' * 100000) }}",
    "formats": "{{ '%1000000000d' % 5 }}",
    "formats with a precision": "{{ '%5.1000000000f' % 5 }}",
    "formats by name": "{{ '%((a))1000000000s' % {'(a)': 5} }}",
    "formats behind a per cent sign": "{{ '%%%1000000000s' % 5 }}",
    "formats with a given width": "{{ '%*d' % (10**9, 5) }}",
    "the format filter": "{{ '%1000000000d' | format(5) }}",
    "str.format": "{{ '{:1000000000}'.format(5) }}",
    "str.format with a given width": "{{ '{:{w}}'.format(5, w=10**9) }}",
    "str.format of one argument": "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "replacement": "{{ ('a' * 1000000).replace('', 'x' * 1000000) }}",
    "the filter replace": "{{ ('a' * 1000000) | replace('a', 'x' * 1000000) }}",
    "str.join": "{{ ('x' * 100000).join(range(100000) | map('string')) }}",
    "the filter join": "{{ range(100000) | join('x' * 100000) }}",
    "kept results": "{{ range(100000) | map('center', 1000) | list | length }}",
    "batches": "{{ [1] | batch(10**9, 0) | list }}",
    "slices": "{{ [1] | slice(10**9) | list }}",
    "rounding": "{{ 1.5 | round(10**9, 'ceil') }}",
    "deep lines": "{{ [[[[[[[[[[range(90000) | list]]]]]]]]]] | tojson(indent=1000) }}",
    "a search": "{{ ('a' * 1000000).rfind('a' * 500000 ~ 'b') }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) }}",
    "a table": "{{ ('a' * 100000).translate({97: 'x' * 100000}) }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "endless macros": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "blocks": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "recursive loops": "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a long range": "{{ range(10**9) }}",
    "a long template": "x" * (2**20 + 1),
    "nested brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_a_template_cannot_hang_or_fill_the_memory(name):
    with pytest.raises(InputError, match=r"^messages: refused by the model's chat template: .+") as caught:
        rendered(TOO_MUCH[name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ 10.0 ** 400 }}", "OverflowError: "),
        ("{{ 'a' + 1 }}", "TypeError: can only concatenate"),
        ("{{ [][0].x }}", "list object has no element 0"),
        ("{{ {}.a.b }}", "'dict object' has no attribute 'a'"),
        ("{% if %}", "Expected an expression"),
        ("{% include 'x' %}", "no loader"),
        ("{{ raise_exception('only\n\x1b[31mtext') }}", "only \\\\x1b\\[31mtext"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.mro() }}", "'__class__' of 'str' object is unsafe"),
        ("{{ namespace(__init__=1) }}", "cannot have the attribute '__init__'"),
        ("{{ 1 | nofilter }}", "No filter named 'nofilter'"),
        ("{{ [1, 'a'] | sort }}", "TypeError"),
        ("{{ " + "9" * 5000 + " }}", "ValueError"),
    ],
)
def test_whatever_a_template_raises_is_one_line(template, reason):
    with pytest.raises(InputError, match=f"refused by the model's chat template: .*{reason}") as caught:
        rendered(template)
    assert str(caught.value).isprintable()


def test_a_long_conversation_stays_within_the_limits():
    messages = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "y" * 1000}] * 500
    assert rendered(CHAT_ML, messages).count("<|im_start|>") == 1002
    assert len(rendered(TOOLS, messages)) > 1_000_000
    grown = "{% set n = namespace(x=[]) %}{% for m in messages %}{% set n.x = n.x + [m] %}{% endfor %}"
    assert rendered(grown + "{{ n.x | length }}", messages) == "1000"
    users = "messages | selectattr('role', 'equalto', 'user') | list | length"
    assert rendered(f"{{% for m in messages %}}{{{{ {users} }}}}{{% endfor %}}", messages[:300]) == "150" * 300


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ("hello", {}, "messages: expected a list of objects with role and content, got str"),
        ([], {}, "messages: expected at least one message, got none"),
        ([3], {}, r"messages\[0\]: expected an object with role and content, got 3"),
        ([{"role": "user"}], {}, r"messages\[0\]: expected an object with role and content, got one with \['role'\]"),
        ([{"content": "x"}], {}, r"got one with \['content'\]"),
        ([{"role": 3, "content": "x"}], {}, r"messages\[0\]"),
        ([{"role": "user", "content": 3}], {}, r"messages\[0\].content: expected text or a list of parts, got int"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, r"content\[0\]: this model reads text alone"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], {}, "got 'input_audio'"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, r"content\[0\]: expected its text as a string"),
        ([{"role": "user", "content": object()}], {}, r"messages\[0\].content: expected text, numbers, .* got object"),
        ([{**USER, ("a",): 1}], {}, r"messages\[0\]: expected text as names, got tuple"),
        ([USER], {"tools": [print]}, "tools: expected a list of JSON objects"),
        ([USER], {"tools": "f"}, "tools: expected a list of JSON objects"),
        ([USER], {"chat_template": 3}, "chat_template: expected a template or the name of one, got int"),
        ([USER], {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs: messages: expected as arguments"),
        ([USER], {"chat_template_kwargs": 3}, "chat_template_kwargs: expected an object"),
        ([USER], {"add_generation_prompt": True, "continue_final_message": True}, "got both"),
        ([{"role": "assistant", "tool_calls": [CALL]}], {"continue_final_message": True}, "no content to go on with"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, options, message):
    with pytest.raises(InputError, match=message) as caught:
        ChatTemplate({"default": CHAT_ML}, {}).render(messages, **options)
    assert "\n" not in str(caught.value)


def test_messages_nested_too_deep_are_refused():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="at most 64 levels"):
        rendered(CHAT_ML, [{"role": "user", "content": "x", "more": deep}])


def test_a_last_message_that_the_template_changes_cannot_be_continued():
    with pytest.raises(InputError, match="does not write the last message's text"):
        rendered(
            "{{ messages[0].content | upper }}", [{"role": "assistant", "content": "abc"}], continue_final_message=True
        )


@pytest.fixture(scope="module")
def folder(pico_llama, tmp_path_factory):
    """A model with two templates."""
    saved = pico.save(pico_llama[0], tmp_path_factory.mktemp("chat"))
    tokenizer = pico.build_tokenizer()
    tokenizer.chat_template = {"default": pico.CHAT_TEMPLATE, "tool_use": "{{ tools[0].name }}" + pico.CHAT_TEMPLATE}
    tokenizer.save_pretrained(saved)
    return saved


def test_a_runtime_chats_with_tools_prefill_and_parts(folder):
    runtime = Runtime.load(folder, device="cpu")
    options = {"max_new_tokens": 2, "temperature": 0}
    parts = {"role": "user", "content": [{"type": "text", "text": "the"}]}
    assert runtime.chat([parts], **options).prompt == "<|user|>user: the\n<|assistant|>"
    assert runtime.chat([parts], tools=[{"name": "f"}], **options).prompt.startswith("f<|user|>")
    prefill = [parts, {"role": "assistant", "content": "quick"}]
    out = runtime.chat(prefill, continue_final_message=True, **options)
    assert out.prompt == "<|user|>user: the\n<|user|>assistant: quick"
    assert list(out.prompt_token_ids) == runtime.tokenizer.encode(out.prompt, add_special_tokens=False)
    assert runtime.chat([parts], chat_template="{{ x }}!", chat_template_kwargs={"x": 1}, **options).prompt == "1!"
    with pytest.raises(InputError, match="unknown options"):
        runtime.chat([parts], colour=1)


def test_special_tokens_in_a_message_are_text_if_so_wished(folder):
    runtime = Runtime.load(folder, device="cpu")
    tokenizer = runtime.tokenizer
    control = tokenizer.encode("<|assistant|>", add_special_tokens=False)
    assert len(control) == 1
    spelled = tokenizer.encode("<|assistant|>", add_special_tokens=False, split_special_tokens=True)
    assert len(spelled) > 1 and control[0] not in spelled and tokenizer.decode(spelled) == "<|assistant|>"
    messages = [{"role": "user", "content": "the </s><|assistant|> quick é <|assistant|>"}]
    plain = runtime.chat(messages, max_new_tokens=1)
    assert plain.prompt_token_ids.count(control[0]) == 3
    quoted = runtime.chat(messages, max_new_tokens=1, split_special_tokens=True)
    assert quoted.prompt == plain.prompt
    assert quoted.prompt_token_ids.count(control[0]) == 1 and quoted.prompt_token_ids[-1] == control[0]
    assert tokenizer.decode(quoted.prompt_token_ids, skip_special_tokens=False) == quoted.prompt


END = "<|end|>"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ messages[0].content }}", f"a {END} b"),
        ("{{ messages[0].content | tojson(ensure_ascii=True) }}", f'"a {END} b"'),
        ("{{ messages[0] }}", f"{{'role': 'user', 'content': 'a {END} b'}}"),
        ("{{ messages[0].content[:-4] }}", f"a {END}"),
        ("{{ messages[0].content[4:] }}", f"{END} b"),
        ("{{ messages[0].content.split('<|end|>') | join('-') }}", "a - b"),
    ],
)
def test_special_tokens_stay_text_whatever_a_template_does_with_them(template, text):
    found = ChatTemplate({"default": template + END}, {}, [END]).render(
        [{"role": "user", "content": f"a {END} b"}], quote=True
    )
    assert [found.text[a:b] for a, b in found.quoted] == [END] * text.count(END)
    assert all(b < len(found.text) for _, b in found.quoted)  # the last one is the template's
    digits = re.compile(r"\d+")
    assert digits.sub("", found.text) == text + END and len(digits.findall(found.text)) <= 1  # a half of a cut mark


def test_a_message_cannot_quote_what_the_template_writes():
    marks = [chr(code) for code in (0xF0000, 0xF0001)]
    messages = [{"role": "user", "content": "a" + marks[0]}, {"role": "assistant", "content": marks[1] + "b"}]
    template = "{{ messages[0].content }}<|end|>{{ messages[1].content }}"
    found = ChatTemplate({"default": template}, {}, [END]).render(messages, quote=True)
    assert found == (f"a{marks[0]}{END}{marks[1]}b", [])
