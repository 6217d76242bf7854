"""Jinja templates of unknown origin, rendered with bounds on time and memory.

The environment is the one that Transformers renders chat templates in: an immutable sandbox with `{% break %}`,
`{% continue %}`, `{% generation %}`, `tojson`, `raise_exception` and `strftime_now`. Nothing in a template can hang or
fill the memory: values are measured when they are made, loop rounds and calls counted, and operations whose result
could be far larger than what they are given are looked at before.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from depthprune_runtime.text.template_meter import (
    MAX_WIDTH,
    METER,
    Meter,
    TooMuch,
    count,
    made,
    require_size,
    size_of,
    step,
)
from depthprune_runtime.text.template_operations import (
    Formatter,
    add,
    bounded_filter,
    check_call,
    join_filter,
    joined,
    multiply,
    power,
    remainder,
    sum_filter,
)

MAX_TEMPLATE = 1 << 20  # characters of a template
_NO_FILTERS = ("pprint", "urlize", "wordwrap", "xmlattr")  # of no use in prompts, and slow on large values


def _tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(format: str) -> str:
    if len(format) > MAX_WIDTH:
        raise TooMuch(f"it calls strftime_now with more than {MAX_WIDTH} characters")
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
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=made)
        self.binop_table |= {"+": add, "*": multiply, "**": power, "%": remainder}
        self.filters = {n: f for n, f in self.filters.items() if n not in _NO_FILTERS}
        self.filters |= {"join": join_filter, "sum": sum_filter, "tojson": _tojson}
        self.filters = {n: bounded_filter(n, f) for n, f in self.filters.items()}
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
            "dict": _Dict(),
            "namespace": _Namespace,
        }
        self._own = (self.count, self.measured, self.concatenated) = (count, made, _concatenated)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MAX_TEMPLATE:
            raise TooMuch(f"it is longer than {MAX_TEMPLATE:,} characters")
        template: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        return template.set_environment(self)  # type: ignore[return-value]

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        return made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  as jinja has it
        if __obj in __self._own:
            return __obj(*args)
        step()
        size_of(*args, *kwargs.values())
        check_call(__obj, args)
        if getattr(__obj, "__name__", "") == "join" and isinstance(getattr(__obj, "__self__", None), str) and args:
            return made(joined(__obj.__self__, args[0]))
        result = made(super().call(__context, __obj, *args, **kwargs))
        meter = METER.get()
        if meter is not None and isinstance(getattr(__obj, "__self__", None), str | bytes):  # its parts are new
            meter.work(size_of(result))
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        bounded = super().wrap_str_format(value)
        if bounded is None:
            return None
        text, takes_mapping = str(value.__self__), value.__name__ == "format_map"

        @functools.wraps(bounded)
        def formatted(*args: Any, **values: Any) -> str:
            require_size(len(text))
            given = args[0] if takes_mapping else values
            return Formatter(self).vformat(text, () if takes_mapping else args, given)

        return formatted


def _concatenated(*values: Any) -> Any:
    size_of(*values)
    return made("".join(map(str, values)))


@functools.lru_cache(maxsize=16)
def compiled(source: str) -> jinja2.Template:
    """The template; raises what jinja raises for one that it does not understand."""
    return BoundedEnvironment().from_string(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text of template `source`. Raises whatever the template raises, and TooMuch beyond the limits."""
    template = compiled(source)
    token = METER.set(Meter())
    try:
        return template.render(variables)
    finally:
        METER.reset(token)
