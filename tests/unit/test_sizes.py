"""Budgets: short files, short functions, few arguments, annotated signatures."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence

import pytest

from tests.helpers.source import Function, Source, shipped

# p95 is what most code keeps to; the hard limit holds for all of it.
MAX_FILE_LINES, P95_FILE_LINES = 400, 350
MAX_FUNCTION_LINES, P95_FUNCTION_LINES = 80, 50
# Beyond six a function needs a type for its arguments; two keyword-only ones more are tolerated.
MAX_ARGUMENTS, MAX_POSITIONAL_ARGUMENTS = 8, 6
# Signatures that a library dictates, with the library's reason.
DICTATED = {
    "mopd.student.attention.CausalAttention.__init__": "Megatron builds it like this",
}


def file_lines(source: Source) -> int:
    return len(source.text.splitlines())


def function_lines(function: Function) -> int:
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def long_files(source: Source) -> Iterator[str]:
    if (lines := file_lines(source)) > MAX_FILE_LINES:
        yield f"{source.module}: {lines} lines"


def long_functions(source: Source) -> Iterator[str]:
    for name, function in source.functions():
        if (lines := function_lines(function)) > MAX_FUNCTION_LINES:
            yield f"{name}: {lines} lines"


def many_arguments(source: Source) -> Iterator[str]:
    for name, function in source.functions():
        positional, keyword_only = parameters(function)
        total = len(positional) + len(keyword_only)
        too_many = total > MAX_ARGUMENTS or len(positional) > MAX_POSITIONAL_ARGUMENTS
        if too_many and name not in DICTATED:
            yield f"{name}: {total} arguments, {len(positional)} of them positional"


def bare_signatures(source: Source) -> Iterator[str]:
    for name, function in public_functions(source.tree, source.module):
        arguments = function.args
        positional, keyword_only = parameters(function)
        stars = [star for star in (arguments.vararg, arguments.kwarg) if star]
        bare = [a.arg for a in (*positional, *keyword_only, *stars) if a.annotation is None]
        if function.returns is None:
            bare.append("return")
        if bare:
            yield f"{name}: no annotation on {', '.join(bare)}"


def parameters(function: Function) -> tuple[list[ast.arg], list[ast.arg]]:
    """Positional and keyword-only parameters, without self or cls."""
    positional = [*function.args.posonlyargs, *function.args.args]
    if positional and positional[0].arg in ("self", "cls"):
        positional = positional[1:]
    return positional, function.args.kwonlyargs


def public_functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
    """Functions that others can call: not private, not nested in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, f"{prefix}.{child.name}")
        elif isinstance(child, ast.If | ast.Try):
            yield from public_functions(child, prefix)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            is_dunder = child.name.startswith("__") and child.name.endswith("__")
            if is_dunder or not child.name.startswith("_"):
                yield f"{prefix}.{child.name}", child


def p95(numbers: Sequence[int]) -> int:
    return sorted(numbers)[int(0.95 * (len(numbers) - 1))]


Rule = Callable[[Source], Iterator[str]]
RULES: tuple[Rule, ...] = (long_files, long_functions, many_arguments, bare_signatures)


@pytest.mark.parametrize("rule", RULES)
def test_shipped_code_keeps_the_budget(rule: Rule) -> None:
    assert [problem for source in shipped() for problem in rule(source)] == []


def test_most_files_and_functions_are_short() -> None:
    sources = shipped()
    lengths = [function_lines(f) for source in sources for _, f in source.functions()]
    assert p95([file_lines(source) for source in sources]) <= P95_FILE_LINES
    assert p95(lengths) <= P95_FUNCTION_LINES


MUTATIONS = [
    (long_files, "\n" * 401),
    (long_functions, "def f() -> None:\n" + "    pass\n" * 80),
    (long_functions, "class A:\n  async def f(self) -> None:\n" + "    pass\n" * 80),
    (many_arguments, "def f(a, b, c, d, e, f, g): ..."),
    (many_arguments, "def f(a, *, b, c, d, e, f, g, h, i): ..."),
    (many_arguments, "def outer():\n    def f(a, b, c, d, e, f, g): ..."),
    (bare_signatures, "def f(a) -> None: ..."),
    (bare_signatures, "def f(a: int): ..."),
    (bare_signatures, "def f(*a) -> None: ..."),
    (bare_signatures, "class A:\n    def __init__(self, a: int): ..."),
]


@pytest.mark.parametrize(("rule", "text"), MUTATIONS)
def test_code_over_the_budget_is_caught(rule: Rule, text: str) -> None:
    assert list(rule(Source("mopd.bad", text)))


def test_every_rule_has_a_mutation() -> None:
    assert {rule for rule, _ in MUTATIONS} == set(RULES)


def test_code_inside_the_budget_is_left_alone() -> None:
    text = """
class A:
    def f(self, a: int, *, b: int, c: int, d: int, e: int, f: int, g: int, h: int) -> None:
        def nested(x): ...
    def _private(self, x): ...
"""
    assert [problem for rule in RULES for problem in rule(Source("mopd.good", text))] == []


def test_no_exception_is_left_over() -> None:
    assert set(DICTATED) <= {name for source in shipped() for name, _ in source.functions()}


def test_p95() -> None:
    assert p95(range(1, 101)) == 95
    assert p95([7]) == 7
