"""Jinja templates of unknown origin, rendered with bounds on time and memory.

The environment is the one that Transformers renders chat templates in: an immutable sandbox with `{% break %}`,
`{% continue %}`, `{% generation %}`, `tojson`, `raise_exception` and `strftime_now`. Nothing in a template can hang or
fill the memory: values are measured when they are made, loop rounds and calls counted, and operations whose result
could be far larger than what they are given are looked at before.
"""

from __future__ import annotations

import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE = 1 << 20  # characters of a template
MAX_VALUE = 1 << 24  # characters of a text; 8 count for each element of a list
MAX_WORK = 1 << 27  # characters of all values that one rendering makes
MAX_STEPS = 200_000  # loop rounds and calls of one rendering
MAX_SECONDS = 5.0  # of processor time of one rendering
_MAX_WIDTH = 1000  # of padding, indentation and other numbers that make text
_MAX_BITS = 1 << 14  # of an integer

_NO_FILTERS = ("pprint", "urlize", "wordwrap", "xmlattr")  # of no use in prompts, and slow on large values
_NO_METHODS = {"expandtabs", "maketrans", "to_bytes", "translate"}
_PADDING = {"center", "ljust", "rjust", "zfill"}
_SEARCHING = {"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"}  # slow for a long argument
_NUMBERS_MAKE_TEXT = {"batch", "center", "indent", "round", "slice", "tojson", "truncate"}


class TooMuch(jinja2.TemplateError):
    """The template asks for more than one rendering may take."""


class _Meter:
    """What one rendering has used."""

    def __init__(self) -> None:
        self._steps = 0
        self._work = 0
        self._end = time.thread_time() + MAX_SECONDS
        self.sizes: dict[int, tuple[Any, int]] = {}

    def step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise TooMuch(f"it takes more than {MAX_STEPS:,} loop rounds and calls")
        if self._steps % 64 == 0 and time.thread_time() > self._end:
            raise TooMuch(f"it takes more than {MAX_SECONDS:g} seconds of processor time")

    def work(self, size: int) -> None:
        self._work += size
        if self._work > MAX_WORK:
            raise TooMuch(f"it makes more than {MAX_WORK:,} characters of text")


_meter: contextvars.ContextVar[_Meter | None] = contextvars.ContextVar("meter", default=None)


def _require_size(size: int) -> int:
    if size > MAX_VALUE:
        raise TooMuch(f"it makes a value of more than {MAX_VALUE:,} characters")
    return size


def _size(*values: Any) -> int:
    """Characters that `values` stand for, written out. Raises TooMuch beyond the limit."""
    meter = _meter.get()
    known = {} if meter is None else meter.sizes
    return _require_size(sum(_size_of(value, known) for value in values))


def _size_of(value: Any, known: dict[int, tuple[Any, int]]) -> int:
    """known: id -> a container and its size; a template cannot change them, so each is looked through once."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise TooMuch("it makes too large a number")
        return _ELEMENT
    if isinstance(value, range):
        return _ELEMENT * len(value)
    if isinstance(value, Namespace):
        return sum(_size_of(inner, known) for inner in value._Namespace__attrs.values())
    if not isinstance(value, _CONTAINERS):
        return _ELEMENT
    found = known.get(id(value))
    if found is not None:
        return found[1]
    inside = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
    size = _ELEMENT * len(value)
    for inner in inside:
        if isinstance(inner, Namespace):  # it could come to hold itself
            raise TooMuch("a namespace cannot be an element")
        size = _require_size(size + _size_of(inner, known))
    known[id(value)] = (value, size)
    return size


_ELEMENT = 8  # characters that an element of a list, or a number, counts for
_CONTAINERS = (list, tuple, set, frozenset, Mapping, KeysView, ValuesView, ItemsView)


def _made(value: Any) -> Any:
    """`value`, which the template has made just now, if it may. What it contains was there before."""
    size = _size(value)
    meter = _meter.get()
    if meter is not None:
        meter.work(_ELEMENT * len(value) if isinstance(value, _CONTAINERS) else size)
    return value


def _step() -> bool:
    meter = _meter.get()
    if meter is None:
        raise TooMuch("it can only be evaluated when it is rendered")
    meter.step()
    return True


def _add(left: Any, right: Any) -> Any:
    size = _size(left, right)
    total = left + right
    meter = _meter.get()
    if meter is not None and isinstance(total, list):  # lists are built up so; none is looked through anew
        meter.sizes[id(total)] = (total, size)
    return total


def _multiply(left: Any, right: Any) -> Any:
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | bytes | list | tuple) and isinstance(count, int):
            _require_size(_size(sequence) * max(count, 0))
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > _MAX_BITS:
        raise TooMuch("it makes too large a number")
    return left**right


def _remainder(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _check_widths(left)
        if re.search(r"%(\(.*?\))?[-#0 +]*(\*|\d*\.\*)", left):
            raise TooMuch("it formats text with a width that is an argument")
        _require_size(len(left) + left.count("%") * _size(right))
    return left % right


def _check_widths(text: str) -> None:
    """Refuse large numbers in a format."""
    if any(int(digits[:9]) > _MAX_WIDTH for digits in re.findall(r"\d+", text)):
        raise TooMuch(f"it formats text with a number above {_MAX_WIDTH}")


def _replaced(text: Any, old: Any, new: Any) -> None:
    """Refuse a replacement that makes too long a text."""
    text, old, new = str(text), str(old), str(new)
    times = text.count(old) if old else len(text) + 1
    _require_size(len(text) + times * len(new))


def _joined(separator: str, items: Iterable[Any]) -> str:
    """`separator.join` of texts that are measured one by one."""
    parts: list[str] = []
    total = 0
    for item in items:
        parts.append(item)
        total = _require_size(total + len(separator) + len(item))
    return separator.join(parts)


class _Formatter(SandboxedFormatter):
    """`str.format` with bounded widths and a bounded result."""

    _total = 0

    def format_field(self, value: Any, format_spec: str) -> str:
        _check_widths(format_spec)
        _size(value)
        text = str(super().format_field(value, format_spec))
        self._total = _require_size(self._total + len(text))
        return text


def _check_call(function: Any, args: Sequence[Any]) -> None:
    """Refuse a call of a text's or number's own method that makes far more than it is given."""
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if not isinstance(owner, str | bytes | int | float):
        return
    if name in _NO_METHODS:
        raise TooMuch(f"its sandbox has no {type(owner).__name__}.{name}")
    if name in _PADDING:
        _check_numbers(name, args)
    elif name in _SEARCHING and any(isinstance(a, str | bytes) and len(a) > _MAX_WIDTH for a in args):
        raise TooMuch(f"it calls {name} with more than {_MAX_WIDTH} characters")
    elif name == "replace" and len(args) > 1:
        _replaced(owner, args[0], args[1])


def _check_numbers(name: str, values: Iterable[Any]) -> None:
    if any(isinstance(v, int | float) and abs(v) > _MAX_WIDTH for v in values):
        raise TooMuch(f"it calls {name} with a number above {_MAX_WIDTH}")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that counts as a call and whose values are measured."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # where the filtered value is

    @functools.wraps(function)  # with the mark that says what jinja passes first
    def bounded(*args: Any, **options: Any) -> Any:
        _step()
        value, *others = args[first:]
        size = _size(value, *others, *options.values())
        if name in _NUMBERS_MAKE_TEXT:
            _check_numbers(name, [*others, *options.values()])
        if name == "indent":
            width = next((v for v in [*others, *options.values()] if isinstance(v, int | str)), 4)
            _require_size(size + (str(value).count("\n") + 1) * (width if isinstance(width, int) else len(width)))
        elif name == "tojson" and (others or options):
            _require_size(size * (1 + _depth(value)))  # what its lines are indented by
        elif name == "replace" and len(others) > 1:
            _replaced(value, *others[:2])
        elif name == "format":
            return _remainder(str(value), options or tuple(others))
        return _made(function(*args, **options))

    return bounded


def _depth(value: Any) -> int:
    """Levels of containers in `value`, which is small enough to walk."""
    depth, level = 0, [value]
    while level:
        depth += 1
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (
                outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list | tuple) else ()
            )
        ]
    return depth


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Any, d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return _joined(str(d), map(str, value))


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, iterable: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    if attribute is not None:
        iterable = map(make_attrgetter(environment, attribute), iterable)
    total = start
    for item in iterable:
        total = _made(_add(total, item))
    return total


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > _MAX_WIDTH:
        raise TooMuch(f"it calls strftime_now with more than {_MAX_WIDTH} characters")
    return datetime.now().strftime(format)


class _Dict:
    """`dict` without its attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)


class _Namespace(Namespace):
    """A namespace whose attributes may not begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *others = args
        attributes = dict(*others, **values)
        for name, value in attributes.items():
            _check_attribute(name, value)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name, value)
        super().__setitem__(name, value)


def _check_attribute(name: Any, value: Any) -> None:
    if isinstance(value, Namespace):  # it could come to hold itself
        raise TooMuch("a namespace cannot be an attribute")
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


class _Generation(Extension):
    """`{% generation %}`, which marks what the model writes; it renders as its body."""

    tags = {"generation"}  # noqa: RUF012  as jinja declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class _Metered(NodeTransformer):
    """Has a template count its loop rounds and macro calls, and measure what its operators make."""

    @staticmethod
    def _call(name: str, *args: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)

    def _counted(self, node: Any) -> Any:
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("count", nodes.Const(text))))
        return node

    def _measured(self, node: Any) -> Any:
        self.generic_visit(node)
        return self._call("measured", node)

    def visit_For(self, node: nodes.For) -> Any:  # noqa: N802  as jinja calls it
        found = self._counted(node)
        if found.test is not None:
            found.test = nodes.And(self._call("count", nodes.Const(0)), found.test)
        return found

    visit_Macro = visit_CallBlock = _counted  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> Any:  # noqa: N802
        self.generic_visit(node)
        return self._call("concatenated", *node.nodes)

    def visit_List(self, node: Any) -> Any:  # noqa: N802
        return node if all(isinstance(item, nodes.Const) for item in node.items) else self._measured(node)

    def visit_Tuple(self, node: Any) -> Any:  # noqa: N802
        return node if node.ctx != "load" else self.visit_List(node)

    def visit_Dict(self, node: Any) -> Any:  # noqa: N802
        return self._measured(node)

    def visit_Getitem(self, node: nodes.Getitem) -> Any:  # noqa: N802
        if isinstance(node.arg, nodes.Slice):
            return self._measured(node)
        self.generic_visit(node)
        return node


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of Transformers' chat templates, within limits."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_made)
        self.binop_table |= {"+": _add, "*": _multiply, "**": _power, "%": _remainder}
        self.filters = {n: f for n, f in self.filters.items() if n not in _NO_FILTERS}
        self.filters |= {"join": _join, "sum": _sum, "tojson": _tojson}
        self.filters = {n: _bounded_filter(n, f) for n, f in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._own = (self.count, self.measured, self.concatenated) = (_count, _made, _concatenated)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_TEMPLATE:
            raise TooMuch(f"it is longer than {MAX_TEMPLATE:,} characters")
        template: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        return template.set_environment(self)  # type: ignore[return-value]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return _made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  as jinja has it
        if __obj in __self._own:
            return __obj(*args)
        _step()
        _size(*args, *kwargs.values())
        _check_call(__obj, args)
        if getattr(__obj, "__name__", "") == "join" and isinstance(getattr(__obj, "__self__", None), str) and args:
            return _made(_joined(__obj.__self__, args[0]))
        result = _made(super().call(__context, __obj, *args, **kwargs))
        meter = _meter.get()
        if meter is not None and isinstance(getattr(__obj, "__self__", None), str | bytes):  # its parts are new
            meter.work(_size(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        bounded = super().wrap_str_format(value)
        if bounded is None:
            return None
        text, takes_mapping = str(value.__self__), value.__name__ == "format_map"

        @functools.wraps(bounded)
        def formatted(*args: Any, **values: Any) -> str:
            _require_size(len(text))
            given = args[0] if takes_mapping else values
            return _Formatter(self).vformat(text, () if takes_mapping else args, given)

        return formatted


def _count(text: int) -> bool:
    """One more round, which writes so much text of the template itself."""
    _step()
    meter = _meter.get()
    if meter is not None:
        meter.work(text)
    return True


def _concatenated(*values: Any) -> Any:
    _size(*values)
    return _made("".join(map(str, values)))


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The template; raises what jinja raises for one that it does not understand."""
    return BoundedEnvironment().from_string(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of template `source`. Raises whatever the template raises, and TooMuch beyond the limits."""
    template = compiled(source)
    token = _meter.set(_Meter())
    try:
        return template.render(variables)
    finally:
        _meter.reset(token)
