"""Arithmetic that a user writes, over the columns of a table or the sizes of a run: read, checked and worked out.

Python's syntax is parsed and every node is looked up in a list of what is allowed; nothing is run by `eval`. `^` is
a power, as people write laws. A column whose name is no word stands in backticks: `tokens (B)` * 1e9.
"""

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp

SUFFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
DIGITS = r"[+-]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
NUMBER = re.compile(rf"({DIGITS})\s*([kmbgt]?)", re.IGNORECASE)
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
COMPARISONS = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, among: value in among,
    ast.NotIn: lambda value, among: value not in among,
}
FUNCTIONS = {
    "log": math.log,
    "log10": math.log10,
    "log2": math.log2,
    "exp": math.exp,
    "sqrt": math.sqrt,
    "abs": abs,
    "min": min,
    "max": max,
    "round": round,
}
# The same for arrays and derivatives: what a law may use
ARRAYS = {name: getattr(jnp, name) for name in ("log", "log10", "log2", "exp", "sqrt", "abs")}
ARRAYS |= {"min": jnp.minimum, "max": jnp.maximum}
LONGEST = 2000  # characters: far beyond any law, and parsing stays quick
HIDDEN = "column_in_backticks_"


def number(text: object) -> float:
    """A number as tables write it: 2.8B and 125m (millions) too, and 1,000,000. Raises ValueError for anything else."""
    if not isinstance(text, str):
        return float("true" if isinstance(text, bool) else text)
    if found := NUMBER.fullmatch(text.strip()):
        return float(found[1].replace(",", "")) * SUFFIXES[found[2].lower()]
    return float(text)


@dataclass(frozen=True)
class Expression:
    """A checked expression; `names` are what it reads, in the order of their first appearance."""

    text: str
    tree: ast.expr
    names: tuple[str, ...]
    quoted: Mapping[str, str]  # stand-in -> the name that stood in backticks

    @property
    def alone(self) -> bool:
        """Whether it is one name and nothing else."""
        return isinstance(self.tree, ast.Name)

    def __call__(self, values: Mapping, functions: Mapping[str, Callable] = FUNCTIONS):
        """Its value. Raises ValueError in words where it has none: a division by 0, a text in a sum."""
        try:
            return _value(self.tree, values, functions, self.quoted)
        except (ArithmeticError, TypeError, ValueError) as error:
            raise ValueError(f"{self.text} has no value here: {error}") from None


def parse(text: str) -> Expression:
    """Raises ValueError, in one line, for what does not parse or is not allowed."""
    if len(text) > LONGEST:
        raise ValueError(f"an expression of {len(text)} characters; {LONGEST} are the most")
    quoted: dict[str, str] = {}

    def stand_in(found: re.Match) -> str:
        name = f"{HIDDEN}{len(quoted)}"
        quoted[name] = found[1]
        return f" {name} "

    plain = re.sub(r"`([^`]+)`", stand_in, text).strip().replace("^", "**")
    try:
        tree = ast.parse(plain, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        words = getattr(error, "msg", None) or str(error)
        raise ValueError(f"{text!r:.200} is not an expression: {words}") from None
    names: dict[str, None] = {}
    _check(tree, text, names)
    return Expression(text, tree, tuple(quoted.get(name, name) for name in names), quoted)


def _check(node: ast.AST, text: str, names: dict[str, None]) -> None:
    """Raises ValueError unless this node and all below are of the few allowed kinds; gathers names."""
    below: list[ast.AST] = []
    match node:
        case ast.Constant(value=bool() | int() | float() | str()):
            pass
        case ast.Name(id=name):
            names.setdefault(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY or isinstance(op, ast.Pow):
            below = [left, right]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
            below = [operand]
        case ast.BoolOp(values=values):
            below = values
        case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in COMPARISONS for op in ops):
            below = [left, *rest]
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
            below = arguments
        case ast.Tuple(elts=elements) | ast.List(elts=elements):
            below = elements
        case _:
            raise ValueError(
                f"{text!r:.200}: {type(node).__name__} is not allowed; there are columns, numbers, 'texts', + - * /"
                f" // % ^ < <= == != >= > in, and or not, {', '.join(FUNCTIONS)}()"
            )
    for one in below:
        _check(one, text, names)


def _value(node: ast.AST, values: Mapping, functions: Mapping[str, Callable], quoted: Mapping[str, str]):
    below = lambda one: _value(one, values, functions, quoted)
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return values[quoted.get(name, name)]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(below(left), below(right))
        case ast.BinOp(left=left, op=op, right=right):
            sides = below(left), below(right)
            if texts := [side for side in sides if isinstance(side, str)]:
                raise TypeError(f"{texts[0]!r:.40} is a text, not a number")
            return BINARY[type(op)](*sides)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not below(operand)
        case ast.UnaryOp(op=op, operand=operand):
            return -below(operand) if isinstance(op, ast.USub) else +below(operand)
        case ast.BoolOp(op=op, values=parts):
            return (all if isinstance(op, ast.And) else any)(below(part) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=rest):
            sides = [below(left), *map(below, rest)]
            return all(COMPARISONS[type(op)](a, b) for op, a, b in zip(ops, sides, sides[1:], strict=False))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return functions[name](*map(below, arguments))
    return [below(element) for element in node.elts]


def _power(base, exponent):
    """In floating point: an integer power could have a million digits, a root of a negative number would be complex."""
    if isinstance(base, int | float) and isinstance(exponent, int | float):
        return math.pow(base, exponent)
    if isinstance(base, str) or isinstance(exponent, str):
        raise TypeError(f"{base!r:.40} ^ {exponent!r:.40}: a text is not a number")
    return base**exponent


def cell(raw: object) -> object:
    """A table's value for an expression: a number where it is one, else a text; nothing is the empty text."""
    if raw is None or isinstance(raw, bool):
        return "" if raw is None else raw
    try:
        return number(raw)
    except (TypeError, ValueError, OverflowError):
        return str(raw)
