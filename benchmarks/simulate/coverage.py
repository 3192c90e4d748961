"""Which statements of the one decision the histories reach: `ftlib/runs/decide.py`, counted without a tracer, which
would make each history four times slower."""

from __future__ import annotations

import ast
import contextlib
import inspect
import types
from collections.abc import Iterator

from ftlib.runs import decide

_HITS = "_statements_that_ran"


class Reached:
    """The statements in functions of the reducer, by line, and those that ran."""

    def __init__(self, statements: dict[int, str]) -> None:
        self.statements: dict[int, str] = statements  # line -> its text, at most 100 characters of it
        self.ran: set[int] = set()

    @property
    def missed(self) -> dict[int, str]:
        """Line -> text of what did not run."""
        return {line: text for line, text in self.statements.items() if line not in self.ran}


@contextlib.contextmanager
def watched() -> Iterator[Reached]:
    """Note what runs while this lasts."""
    source = inspect.getsource(decide)
    tree = ast.parse(source)
    marker = _Marker()
    marker.visit(tree)
    reached = Reached(dict(sorted(marker.statements.items())))
    marked = dict(_functions(compile(ast.fix_missing_locations(tree), decide.__file__, "exec")))
    functions = [one for _, one in inspect.getmembers(decide, inspect.isfunction)]
    for _, kind in inspect.getmembers(decide, inspect.isclass):
        functions += [one for one in vars(kind).values() if inspect.isfunction(one)]
    chosen = [one for one in functions if one.__qualname__ in marked and one.__module__ == decide.__name__]
    before = [one.__code__ for one in chosen]
    setattr(decide, _HITS, reached.ran)
    try:
        for function in chosen:
            function.__code__ = marked[function.__qualname__]
        yield reached
    finally:
        for function, code in zip(chosen, before, strict=True):
            function.__code__ = code
        delattr(decide, _HITS)


class _Marker(ast.NodeTransformer):
    """Puts a note in front of every statement of every function."""

    def __init__(self) -> None:
        self.statements: dict[int, str] = {}  # line -> text, its beginning
        self._in_function: bool = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        outside, self._in_function = self._in_function, True
        self.generic_visit(node)
        self._in_function = outside
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        for name in ("body", "orelse"):
            block = getattr(node, name, None)
            if self._in_function and isinstance(block, list):
                setattr(node, name, [marked for statement in block for marked in self._marked(statement)])
        return node

    def _marked(self, statement: ast.stmt) -> list[ast.stmt]:
        docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if docstring:
            return [statement]
        self.statements[statement.lineno] = " ".join(ast.unparse(statement).split())[:100]
        note = ast.parse(f"{_HITS}.add({statement.lineno})").body[0]
        return [ast.copy_location(note, statement), statement]


def _functions(code: types.CodeType, prefix: str = "") -> Iterator[tuple[str, types.CodeType]]:
    """Qualified name -> the code of each function and of each class's methods."""
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield f"{prefix}{constant.co_name}", constant
            yield from _functions(constant, f"{prefix}{constant.co_name}.")
