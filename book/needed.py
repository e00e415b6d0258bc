"""Of a chapter's code, what some cells need: read, not run."""

import ast
import symtable
from collections.abc import Iterator

from nbformat import NotebookNode
from nbformat.v4 import new_code_cell


def needed(cells: list[NotebookNode], users: list[NotebookNode]) -> list[NotebookNode]:
    """The set-up, the parameters, and what of `cells` the code of `users` needs, as few cells.

    A cell is needed if it binds or changes a name that a needed cell below uses, unless a cell in
    between binds that name anew; and if a function that is needed uses the name, wherever it is.
    """
    later: set[str] = set()
    while True:
        kept = _above(cells, users, later)
        called = {name for cell in kept for name in _inside(cell.source)}
        if called <= later:
            break
        later |= called
    groups: list[list[str]] = [[]]
    for cell in kept:
        alone = _given(cell)
        groups += [[cell.source], []] if alone else []
        groups[-1] += [] if alone else [cell.source]
    found = [new_code_cell("\n\n".join(group)) for group in groups if group]
    for cell in found:
        cell.metadata.tags = ["parameters" if "protocol: str" in cell.source else "hide-input"]
    return found


def _given(cell: NotebookNode) -> bool:
    return bool({"setup", "parameters"} & {*cell.metadata.get("tags", [])})


def _above(
    cells: list[NotebookNode], users: list[NotebookNode], later: set[str]
) -> list[NotebookNode]:
    """Those of `cells` that bind what `users` use, or what is in `later`."""
    open_ = later.copy()
    kept = []
    for cell in [*cells, *users][::-1]:
        user = any(cell is other for other in users)
        if (
            user
            or _given(cell)
            or (bound(cell.source, perhaps=True) | changed(cell.source)) & open_
        ):
            open_ = open_ - bound(cell.source) | free(cell.source)
            kept += [] if user else [cell]
    return kept[::-1]


def bound(source: str, perhaps: bool = False) -> set[str]:
    """The names that a cell binds whatever happens; with `perhaps` also under a condition."""
    statements = ast.parse(source).body
    if not perhaps:
        statements = [s for s in statements if not isinstance(s, ast.If | ast.Try | ast.While)]
    symbols = _table(statements).get_symbols()
    return {s.get_name() for s in symbols if s.is_assigned() or s.is_imported()}


def free(source: str) -> set[str]:
    """The names that a cell takes from cells above it."""
    found: set[str] = set()
    so_far: set[str] = set()
    for statement in ast.parse(source).body:
        text, table = ast.unparse(statement), _table([statement])
        at_once = {s.get_name() for s in table.get_symbols() if s.is_referenced()}
        if not isinstance(statement, ast.Assign | ast.AugAssign):
            at_once -= bound(text)  # a loop's own names
        found |= (at_once | {*_globals(table)} | changed(text)) - so_far
        so_far |= bound(text)
    return found


def _table(statements: list[ast.stmt]) -> symtable.SymbolTable:
    return symtable.symtable(ast.unparse(ast.Module(statements, [])), "cell", "exec")


def _globals(table: symtable.SymbolTable) -> Iterator[str]:
    """The global names that functions and classes use."""
    for inner in table.get_children():
        yield from (s.get_name() for s in inner.get_symbols() if s.is_global())
        yield from _globals(inner)


def _inside(source: str) -> Iterator[str]:
    return _globals(_table(ast.parse(source).body))


def changed(source: str) -> set[str]:
    """The names whose attributes or items a cell assigns, or to which it adds."""
    found = set()
    top = [s for s in ast.parse(source).body if not isinstance(s, ast.FunctionDef | ast.ClassDef)]
    for node in (node for statement in top for node in ast.walk(statement)):
        base: ast.expr | None = None
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            base = node
        elif isinstance(node, ast.AugAssign):
            base = node.target
        elif isinstance(node, ast.Attribute) and node.attr in {"append", "update", "extend", "add"}:
            base = node
        while isinstance(base, ast.Subscript | ast.Attribute):
            base = base.value
        found |= {base.id} if isinstance(base, ast.Name) else set()
    return found
