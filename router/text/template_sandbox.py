"""The environment that chat templates run in: what they may call and name, as in Hugging Face's `apply_chat_template`,
and how much they may do. No I/O.

A template is a program that came with a model. It cannot be stopped from outside, so that it counts its own steps: of
loops, of calls, and of the texts that it makes.
"""

import datetime
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import BuiltinMethodType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

CHARS_A_STEP = 256
"""So much text costs as much as one step."""
MAX_WIDTH = 1_000_000
"""Of what is padded, and of exponents."""
_WIDENING = frozenset(
    ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "to_bytes", "tojson", "wordwrap", "zfill")
)
"""Filters and methods that make of a number as much text, or as many items."""
_SIZED = (str, bytes, list, tuple, dict)
_COUNTED, _CHARGED = "_counted", "_charged"


class TemplateTooBigError(jinja2.TemplateRuntimeError):
    """The template does more than its budget has steps for."""


class StepBudget:
    """The steps that are left to one rendering."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    def __repr__(self) -> str:
        return f"<StepBudget left={self._left}>"

    def spend(self, steps: int) -> None:
        """Raises TemplateTooBigError."""
        self._left -= steps
        if self._left < 0:
            raise TemplateTooBigError("it takes too many steps")

    def spend_text(self, text: str) -> None:
        """For text that is given out. Raises TemplateTooBigError."""
        self.spend(len(text) // CHARS_A_STEP)


_budget: ContextVar[StepBudget | None] = ContextVar("template_budget", default=None)
"""Of the rendering under way; None while templates are compiled, as that computes constant parts."""


@contextmanager
def limited_steps(steps: int) -> Iterator[StepBudget]:
    """Templates that are rendered inside may take so many steps together."""
    budget = StepBudget(steps)
    token = _budget.set(budget)
    try:
        yield budget
    finally:
        _budget.reset(token)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles chat templates."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        extensions = [_GenerationBlocks, "jinja2.ext.loopcontrols"]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        self.filters = {name: _charging(name, function) for name, function in self.filters.items()}
        self.filters |= {"tojson": _charging("tojson", _tojson), _COUNTED: _counted_filter, _CHARGED: _charged_filter}
        self.globals |= {
            "dict": _TemplateDict(),
            "namespace": _TemplateNamespace,
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        del self.globals["lipsum"]  # which makes as much text as one likes

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - jinja's own names
        """As jinja has it, and what is made costs steps."""
        if isinstance(__obj, BuiltinMethodType):
            _check_method(__obj, args, kwargs)
        if isinstance(__obj, LoopContext) and args:  # a recursive loop, from within itself
            args = (_counted(args[0]), *args[1:])
        return _charged(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """As jinja has it, and what is made costs steps; what would be beyond all bounds is not made."""
        if operator == "*":
            _check_product(left, right)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check_widths((left.bit_length() * right,))
        return _charged(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_CountSteps().visit(source).set_environment(self), *args, **kwargs)


class _CountSteps(NodeTransformer):
    """Lets each loop count its items, and each text that is kept cost its length: one that is only given out, as most
    are, cannot grow any further."""

    def __init__(self) -> None:
        self._kept = 0
        """Assignments, calls and heads of loops around the node that is visited."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - named by the node
        items, node.iter = self._visit_kept(node.iter), nodes.Const(None)
        self.generic_visit(node)
        node.iter = _filter(items, _COUNTED)
        return node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:  # noqa: N802
        node.node = _filter(self._visit_kept(node.node), _CHARGED)
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        self._kept += 1
        self.generic_visit(node)
        self._kept -= 1
        return node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, _CHARGED) if self._kept else node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filter(node, _CHARGED) if self._kept else node

    def _visit_kept(self, node: nodes.Node) -> nodes.Node:
        self._kept += 1
        seen: nodes.Node = self.visit(node)
        self._kept -= 1
        return seen

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.filter is None:
            node.filter = _filter(None, _CHARGED)
        return node


def _filter(node: nodes.Node | None, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _counted(items: Iterable[object]) -> Iterator[object]:
    budget = _budget.get()
    for item in items:
        if budget is not None:
            budget.spend(1)
        yield item


def _charged(value: Any) -> Any:
    if (budget := _budget.get()) is not None:
        budget.spend(1 + _size(value) // CHARS_A_STEP)
    return value


@jinja2.pass_context
def _counted_filter(_: Context, items: Iterable[object]) -> Iterator[object]:
    return _counted(items)


@jinja2.pass_context  # so that it is no constant
def _charged_filter(_: Context, value: object) -> object:
    return _charged(value)


def _charging(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def charging(*args: Any, **kwargs: Any) -> Any:
        if name in _WIDENING:
            _check_widths((*args[1:], *kwargs.values()))
        return _charged(function(*args, **kwargs))

    return charging


def _size(value: object) -> int:
    if isinstance(value, _SIZED):
        return len(value)
    return value.bit_length() if isinstance(value, int) else 0


def _check_widths(values: Iterable[object]) -> None:
    if any(isinstance(value, int) and value > MAX_WIDTH for value in values):
        raise TemplateTooBigError(f"it makes something over {MAX_WIDTH} wide")


def _check_method(method: BuiltinMethodType, args: Sequence[Any], kwargs: dict[str, object]) -> None:
    """Of texts: those that make far more of them."""
    text: Any = method.__self__
    name = method.__name__
    if name in _WIDENING:
        _check_widths((*args, *kwargs.values()))
    elif name == "join" and args:
        _check_widths((_size(text) * _size(args[0]),))
    elif name == "replace" and len(args) > 1 and all(isinstance(one, str) for one in (text, *args[:2])):
        _check_widths((text.count(args[0]) * len(args[1]),))


def _check_product(left: object, right: object) -> None:
    for text, times in ((left, right), (right, left)):
        if isinstance(times, int) and not isinstance(text, int) and _size(text) * times > MAX_WIDTH:
            raise TemplateTooBigError(f"it makes something over {MAX_WIDTH} wide")


class _GenerationBlocks(Extension):
    """`{% generation %}` marks what training counts as the assistant's. Its body renders as if the tags were away."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # In a scope of its own, as in transformers: what is set inside is not seen outside.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: jinja2.runtime.Macro) -> str:
        text: str = caller()
        return text


class _TemplateDict:
    """`dict` without the rest of the type, as transformers gives it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _TemplateNamespace(Namespace):
    """`namespace` without names that begin with an underscore, as transformers gives it."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, values = args[0], dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: object) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no name that begins with an underscore: {name!r}")


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    """The local time, as transformers gives it."""
    return datetime.datetime.now().strftime(layout)
