"""`ChatTemplate`: a conversation -> the prompt that the model was trained to see."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes

from depthprune_runtime.errors import InputError
from depthprune_runtime.text.template_sandbox import BoundedEnvironment, render

_RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same thing
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_LEVELS = 64  # of objects within objects in a message


class Prompt(NamedTuple):
    """A rendered conversation. quoted: where special tokens stand that are text of a message, (start, end) each."""

    text: str
    quoted: list[tuple[int, int]]


class ChatTemplate:
    """The chat templates of one model, by name; most have only `default`.

    special_tokens: texts of `bos_token` and its like, which templates write; control: texts of all special tokens,
    which `quote` finds in messages. Templates come from whoever made the
    model, so they are rendered within the limits of `template_sandbox`.
    """

    def __init__(
        self, templates: Mapping[str, str], special_tokens: Mapping[str, str], control: Iterable[str] = ()
    ) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)
        texts = "|".join(sorted((re.escape(text) for text in control if text), key=len, reverse=True)) or r"(?!)"
        self._control = re.compile(texts)
        # Marks around a special token that is text. Nobody who writes a message knows them, and whatever a template
        # does, escaping or `tojson`, leaves digits as they are. One of both is enough: a template may cut a text.
        mark = secrets.randbelow(10**9)
        self._open, self._close = f"{mark:09}1", f"{mark:09}2"
        self._quoted = re.compile(
            f"{self._open}({texts})(?:{self._close})?|({texts}){self._close}|{self._open}|{self._close}"
        )

    def render(
        self,
        messages: Sequence[Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        quote: bool = False,
    ) -> Prompt:
        """The prompt of `messages`.

        quote: find special tokens in what the template is given; the others are as in
        `Tokenizer.apply_chat_template`.
        """
        if add_generation_prompt and continue_final_message:
            raise InputError(
                "add_generation_prompt: it begins a new message, continue_final_message goes on with the last one; "
                "expected one of them, got both"
            )
        source = self._source(chat_template, bool(tools))
        conversation = _conversation(messages)
        given = {
            "tools": _objects("tools", tools),
            "documents": _objects("documents", documents),
            **_variables(chat_template_kwargs),
        }
        if quote:
            conversation, given = self._with_quotes(conversation), self._with_quotes(given)
        try:
            if not _reads_parts(source):
                conversation = [_with_text(message) for message in conversation]
            final = _marked(conversation) if continue_final_message else None
            prompt = render(
                source,
                {
                    **self._special_tokens,
                    **given,
                    "messages": conversation,
                    "add_generation_prompt": not continue_final_message
                    if add_generation_prompt is None
                    else bool(add_generation_prompt),
                },
            )
        except InputError:
            raise
        except Exception as error:  # a template can raise anything
            name = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            raise InputError(f"messages: refused by the model's chat template: {name}{_line(error)}") from error
        return self._without_quotes(prompt if final is None else _cut_at_mark(prompt, final), quote)

    def _with_quotes(self, value: Any) -> Any:
        """`value` with marks around special tokens in its texts, but for names of keys and roles."""
        if isinstance(value, str):
            return self._control.sub(lambda match: f"{self._open}{match[0]}{self._close}", value)
        if isinstance(value, list):
            return [self._with_quotes(inner) for inner in value]
        if isinstance(value, dict):
            return {key: self._with_quotes(inner) for key, inner in value.items()}
        return value

    def _without_quotes(self, prompt: str, quote: bool) -> Prompt:
        parts: list[str] = []
        quoted: list[tuple[int, int]] = []
        length = end = 0
        for match in self._quoted.finditer(prompt) if quote else ():
            text = match[1] or match[2] or ""
            parts += prompt[end : match.start()], text
            length += match.start() - end + len(text)
            if text:
                quoted.append((length - len(text), length))
            end = match.end()
        return Prompt("".join([*parts, prompt[end:]]), quoted)

    def _source(self, chosen: str | None, with_tools: bool) -> str:
        if chosen is not None and not isinstance(chosen, str):
            raise InputError(f"chat_template: expected a template or the name of one, got {type(chosen).__name__}")
        if chosen is not None:
            return self._templates.get(chosen, chosen)
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        raise InputError(
            f"chat_template: the model has none that is the default; name one of {sorted(self._templates)}, or give one"
        )


def _line(error: BaseException) -> str:
    """Its message, as one line that prints."""
    text = " ".join(str(error).split())[:300]
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) or "no reason given"


def _plain(value: Any, what: str, level: int = 0) -> Any:
    """`value` as JSON has it, so that a template meets no methods but those of plain data."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # subclasses, such as enumerations, may have other methods
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if getattr(value, "ndim", None) == 0:  # numbers of numpy and torch
        return _plain(value.item(), what, level + 1)
    if level > _MAX_LEVELS:
        raise InputError(f"{what}: expected at most {_MAX_LEVELS} levels of objects, got more")
    if isinstance(value, Mapping):
        return {_key(k, what): _plain(v, f"{what}.{k}"[:100], level + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{what}[{i}]", level + 1) for i, v in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)}, what, level + 1)
    if callable(getattr(value, "model_dump", None)):  # pydantic, such as the messages of OpenAI's package
        return _plain(value.model_dump(), what, level + 1)
    raise InputError(f"{what}: expected text, numbers, lists and objects, got {type(value).__name__}")


def _key(key: Any, what: str) -> Any:
    plain = _plain(key, what)
    if isinstance(plain, list | dict):
        raise InputError(f"{what}: expected text as names, got {type(key).__name__}")
    return plain


def _conversation(messages: Any) -> list[dict[str, Any]]:
    """`messages` as templates expect them: plain, without keys that are None."""
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise InputError(f"messages: expected a list of objects with role and content, got {type(messages).__name__}")
    if not messages:
        raise InputError("messages: expected at least one message, got none")
    return [_message(_plain(message, f"messages[{i}]"), f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Any, what: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"{what}: expected an object with role and content, got {message!r:.100}")
    found = {key: value for key, value in message.items() if value is not None}
    if not isinstance(found.get("role"), str) or len(found) == 1:
        raise InputError(f"{what}: expected an object with role and content, got one with {sorted(map(str, found))}")
    content = found.get("content", "")
    if not isinstance(content, str | list):
        raise InputError(f"{what}.content: expected text or a list of parts, got {type(content).__name__}")
    if isinstance(content, list):
        found["content"] = [_part(part, f"{what}.content[{i}]") for i, part in enumerate(content)]
    if isinstance(found.get("tool_calls"), list):
        found["tool_calls"] = [_tool_call(call) for call in found["tool_calls"]]
    reasoning = next((found[name] for name in _REASONING if name in found), None)
    return found if reasoning is None else {"thinking": reasoning, **found, "reasoning_content": reasoning}


def _part(part: Any, what: str) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        raise InputError(f"{what}: this model reads text alone; expected a part of type 'text', got {kind!r:.40}")
    if not isinstance(part.get("text"), str):
        raise InputError(f"{what}: expected its text as a string, got {type(part.get('text')).__name__}")
    return part


def _tool_call(call: Any) -> Any:
    """A call whose arguments are an object, as templates expect, where it has them as JSON text, as OpenAI has."""
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return call
    if not isinstance(function, dict) or not isinstance(parsed, dict):
        return call
    return {**call, "function": {**function, "arguments": parsed}}


def _objects(name: str, values: Any) -> list[Any] | None:
    if not values:
        return None
    if not isinstance(values, list | tuple) or not all(isinstance(v, Mapping) for v in values):
        hint = "; transformers.utils.get_json_schema makes one of a function" if name == "tools" else ""
        raise InputError(f"{name}: expected a list of JSON objects, got {values!r:.100}{hint}")
    return list(_plain(values, name))


def _variables(values: Mapping[str, Any] | None) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise InputError(f"chat_template_kwargs: expected an object of variables, got {values!r:.100}")
    taken = sorted(_RESERVED & set(values))
    if taken:
        raise InputError(f"chat_template_kwargs: {', '.join(taken)}: expected as arguments of their own")
    plain: dict[str, Any] = _plain(values, "chat_template_kwargs")
    return plain


@functools.lru_cache(maxsize=16)
def _reads_parts(source: str) -> bool:
    """Whether the template goes through the parts of a message's content."""
    if "content" not in source:
        return False
    return any(_names_content(loop.iter) for loop in BoundedEnvironment().parse(source).find_all(nodes.For))


def _names_content(node: nodes.Node | None) -> bool:
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    return isinstance(node, nodes.Name) and node.name == "content"


def _with_text(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose content is one text, for templates that do not know parts."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(part["text"] for part in content)}


def _marked(conversation: list[dict[str, Any]]) -> str:
    """Put a mark behind the text of the last message, and return that text."""
    content = conversation[-1].get("content")
    if isinstance(content, str):
        conversation[-1]["content"] = content + _MARK
        return content
    if content:
        text = str(content[-1]["text"])
        content[-1] = {**content[-1], "text": text + _MARK}
        return text
    raise InputError("continue_final_message: the last message has no content to go on with")


def _cut_at_mark(prompt: str, final: str) -> str:
    """The prompt up to the end of the last message's text; a template may have trimmed that."""
    at = prompt.rfind(_MARK.strip())
    if at < 0 or final.strip() not in prompt:
        raise InputError("continue_final_message: the chat template does not write the last message's text as it is")
    whole = prompt.startswith(_MARK, at)
    return prompt[:at] if whole else prompt[:at].rstrip()
