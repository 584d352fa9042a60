"""Jinja's sandbox with bounds: what an untrusted template may take of time and memory.

Jinja's own keeps a template from files and from Python; it does not keep `'a' * 3000000000` or nested loops from filling memory and
time. Here each render has a budget of steps: iterations, calls, and the sizes of what is joined, searched and written."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

MAX_STEPS = 1_000_000  # of one render: about a second
MAX_CHARS = 16 * 2**20  # of one text, and of a prompt
MAX_MADE = 2**20  # characters or items that `*`, padding and indentation may make at once
MAX_BITS = 4096  # of an integer
CHARS_A_STEP = 512
ITEMS_A_STEP = 8
STEPS_A_CALL = 4
BUDGET = " budget"  # among the variables; no template can write a name with a space
CONSTANT_TIME = frozenset({"length", "count", "default", "d", "first", "last", "items", "abs", "int", "float", "round"})
LEFT_OUT = ("pprint", "urlize", "xmlattr")  # filters that write much more than they are given
LONG_WIDTH = re.compile(r"[0-9]{5}|\*")  # in a format


class Budget:
    """What is left of one render's steps and characters."""

    def __init__(self) -> None:
        self.steps, self.chars = MAX_STEPS, 4 * MAX_CHARS  # macros' and set blocks' text is written more than once

    def spend(self, steps: int) -> None:
        """Raise OverflowError once the steps are spent."""
        self.steps -= steps
        if self.steps < 0:
            raise OverflowError(f"it takes more than {MAX_STEPS} steps")

    def touch(self, value: Any) -> None:
        """Pay for work that goes once over a text or the items of a container."""
        if isinstance(value, str):
            self.spend(len(value) // CHARS_A_STEP)
        elif isinstance(value, (list, tuple, dict, range)):
            self.spend(len(value) // ITEMS_A_STEP)

    def written(self, value: Any) -> int:
        """About how many characters a value has when written, paid for; items that are there twice count twice."""
        chars, items, rest = 0, 0, [value]
        while rest:
            value = rest.pop()
            if isinstance(value, dict):
                rest += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple, range)):
                rest += value
            chars += len(value) if isinstance(value, (str, list, tuple, dict, range)) else 1
            items += 1
            if chars > MAX_CHARS or max(items, len(rest)) > MAX_MADE:
                raise OverflowError(f"it writes more than {MAX_CHARS} characters")
        self.spend(items // ITEMS_A_STEP + chars // CHARS_A_STEP)
        return chars


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment; render with `{BUDGET: Budget()}` among the variables."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=_finalize, **options)
        for name in LEFT_OUT:
            del self.filters[name]
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.filters.update(_tick=_tick, _weigh=_weigh, _concat=_concat)
        del self.globals["lipsum"]

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """A filter that pays for what it is given and gives."""
        self.filters[name] = _bounded(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Guards().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`*`, `**`, `+` and `%`, within the bounds."""
        budget: Budget = context.parent[BUDGET]
        budget.spend(1)
        if operator == "%" and isinstance(left, str):
            _check_format(budget, left, [right])
        elif isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple)):
            sized = [0 if isinstance(v, int) else _size(v) for v in (left, right)]
            if operator == "*" and isinstance(left, (str, list, tuple)) != isinstance(right, (str, list, tuple)):
                times = right if isinstance(left, (str, list, tuple)) else left
                _bound(max(sized) * times if isinstance(times, int) else 0, MAX_MADE)
            elif operator == "+":
                _bound(sum(sized), MAX_CHARS if isinstance(left, str) else MAX_MADE)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            _bound(bits * max(right, 1) if operator == "**" else bits + right.bit_length(), MAX_BITS)
        result = super().call_binop(context, operator, left, right)
        budget.touch(result)
        return result

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (keywords are the template's)
        """A call of a macro, a function or a method, within the bounds."""
        budget: Budget = __context.parent[BUDGET]
        budget.spend(STEPS_A_CALL)
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, list, tuple, dict)):
            budget.touch(owner)
            if isinstance(owner, str):
                args = _check(budget, getattr(method, "__name__", ""), owner, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        budget.touch(result)
        return result


class _Guards(NodeTransformer):
    """Counts every turn of a loop and body of a macro, and weighs what is compared, cut and joined."""

    def _counted(self, node: Any) -> Any:
        chars = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        cost = 1 + chars // CHARS_A_STEP
        node.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(cost), "_tick")))
        if getattr(node, "test", None) is not None:
            node.test = nodes.And(_filter(nodes.Const(1), "_tick"), node.test)
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802  (jinja2 names it so)
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes), "_concat")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802  (jinja2 names it so)
        self.generic_visit(node)
        searches = any(operand.op in ("in", "notin") for operand in node.ops)
        if (
            not searches
            and any(isinstance(side, nodes.Const) for side in (node.expr, node.ops[0].expr))
            and len(node.ops) == 1
        ):
            return node  # as long as the constant at most
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802  (jinja2 names it so)
        self.generic_visit(node)
        node.args = [_weighed(arg) for arg in node.args]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802  (jinja2 names it so)
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _weighed(node.node)
        return node


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _weighed(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter(node, "_weigh")


@pass_context
def _tick(context: Context, steps: int) -> bool:
    context.parent[BUDGET].spend(steps)
    return True


@pass_context
def _weigh(context: Context, value: Any) -> Any:
    context.parent[BUDGET].touch(value)
    return value


@pass_context
def _concat(context: Context, values: list[Any]) -> str:
    context.parent[BUDGET].written(values)
    return "".join(map(str, values))


@pass_context
def _finalize(context: Context, value: Any) -> Any:
    budget: Budget = context.parent[BUDGET]
    budget.chars -= len(value) if isinstance(value, str) else budget.written(value)
    if budget.chars < 0:
        raise OverflowError(f"it writes more than {MAX_CHARS} characters")
    return value


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passed = _PassArg.from_obj(function)

    @pass_context
    def bounded(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget: Budget = context.parent[BUDGET]
        budget.spend(1)
        if name not in CONSTANT_TIME:
            budget.touch(value)
            value, *args = _check(budget, name, value, (value, *args), kwargs, is_filter=True)  # type: ignore[assignment]
        first = {
            _PassArg.context: (context,),
            _PassArg.eval_context: (context.eval_ctx,),
            _PassArg.environment: (context.environment,),
        }
        result = function(*(first[passed] if passed is not None else ()), value, *args, **kwargs)
        if name not in CONSTANT_TIME:
            budget.touch(result)
        return result

    return bounded


def _check(
    budget: Budget, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any], is_filter: bool = False
) -> tuple[Any, ...]:
    """The arguments of a filter (value included) or a method of a text, once what it makes is known to be within the bounds."""
    given = [*(args[1:] if is_filter else args), *kwargs.values()]
    largest = max((abs(_size(arg)) for arg in given), default=0)
    if name in ("center", "ljust", "rjust", "zfill", "batch", "slice"):
        _bound(largest, MAX_MADE)
    elif name in ("indent", "expandtabs", "wordwrap"):
        _bound(largest * (str(value).count("\t" if name == "expandtabs" else "\n") + 1), MAX_CHARS)
        _bound(
            max((abs(arg) for arg in given if isinstance(arg, int)), default=0),
            MAX_MADE if name != "wordwrap" else 2**40,
        )
    elif name == "tojson":
        _bound(budget.written(value) * (largest + 1), 4 * MAX_CHARS)
    elif name == "replace" and given and isinstance(value, str) and isinstance(given[0], str):
        _bound(len(value) + (value.count(given[0])) * largest, MAX_CHARS)
    elif name == "join":
        items = list(value if is_filter else args[0] if args else [])
        total = budget.written(items)
        _bound(total + len(items) * (largest if is_filter else len(value)), MAX_CHARS)
        return items, *args[1:]
    elif name in ("format", "format_map"):
        _check_format(budget, str(value), given)
    elif name in ("string", "escape", "e", "forceescape", "urlencode"):
        budget.written(value)
    return args


def _check_format(budget: Budget, text: str, values: list[Any]) -> None:
    if LONG_WIDTH.search(text) or any(abs(v) > MAX_MADE for v in values if isinstance(v, int)):
        raise OverflowError("it formats to a width of more than 9999")
    _bound(len(text) + budget.written(values) * (text.count("%") + text.count("{")), MAX_CHARS)


def _size(value: Any) -> int:
    if isinstance(value, (str, list, tuple, dict, range)):
        return len(value)
    return value if isinstance(value, int) else 0


def _bound(size: int, limit: int) -> None:
    if size > limit:
        raise OverflowError(f"it makes a value of more than {limit} characters, items or bits")
