"""A digest of the code that a number depends on: it changes when, and only when, that code does.

The code is read, not run. From the cell of a chapter that notes a number the digest follows every
name: to the cells that bind it, and into `defenses` to the functions, classes and constants that
bear it, and on to theirs. Comments, docstrings and layout do not count, nor does code that only
shows or stores (`SHOWING`) or only says how far it is and goes on from there (`BESIDE`).
"""

import ast
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parent
SHOWING = {"plots", "tables", "prose", "progress", "results", "run", "code", "outcomes"}
# Decorators, statements, and calls that stand for their first argument: without them the same.
BESIDE = {("progress", "one_bar"), ("progress", "say"), ("progress", "track")}
BESIDE.add(("checkpoint", "resumable"))
BESIDE.add(("layout", "forget_rounded"))  # no stored network was trained inside an autocast
SHOWN = {"nbval-check-output", "remove-input", "reader"}  # tags of cells that measure nothing


@dataclass
class Cell:
    """A code cell of a notebook that a measuring run executes."""

    index: int
    source: str
    tags: set[str]


def measuring(notebook: str | Path) -> list[Cell]:
    """The code cells of `notebook` (.ipynb) that a run without a reader needs.

    Left out are those whose tags say that they only show: `nbval-check-output`, `remove-input` and
    `reader`.
    """
    cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
    found = [
        Cell(i, "".join(cell["source"]), set(cell["metadata"].get("tags", [])))
        for i, cell in enumerate(cells)
        if cell["cell_type"] == "code"
    ]
    return [cell for cell in found if not cell.tags & SHOWN]


@dataclass
class Names:
    """What one module, or the cells of one chapter, bind: statements by name, and imports."""

    bound: dict[str, list[ast.stmt]] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)  # alias: (module, name)


def digest(notebook: str | Path, cell: int | None = None) -> str:
    """Eight letters for the code behind what `cell` of `notebook` notes; None: behind all of it."""
    return _digest(Path(notebook), Path(notebook).stat().st_mtime_ns, cell)


@functools.cache
def _digest(notebook: Path, _changed: int, cell: int | None) -> str:
    cells = measuring(notebook)
    body = {c.index: ast.parse(c.source).body for c in cells}
    body |= {c.index: [] for c in cells if "parameters" in c.tags}  # the row itself names them
    chapter = _names(statement for statements in body.values() for statement in statements)
    roots = body[cell] if cell is not None else [s for part in body.values() for s in part]
    seen: set[int] = set()
    texts: set[str] = set()
    open_: list[tuple[Names, ast.stmt]] = [(chapter, statement) for statement in roots]
    while open_:
        scope, statement = open_.pop()
        if id(statement) in seen or isinstance(statement, ast.Import | ast.ImportFrom):
            continue
        seen.add(id(statement))
        texts.add(ast.dump(_Bare(scope).visit(statement)))
        for module, name in _used(statement, scope):
            where = scope if module == "" else _module(module)
            open_ += [(where, found) for found in where.bound.get(name, [])]
            if module and name in where.imports:
                open_ += _follow(where.imports[name])
    return hashlib.sha256("\n".join(sorted(texts)).encode()).hexdigest()[:8]


def _follow(place: tuple[str, str]) -> list[tuple[Names, ast.stmt]]:
    module, name = place
    where = _module(module)
    if name in where.imports:
        return _follow(where.imports[name])
    return [(where, found) for found in where.bound.get(name, [])]


def _used(statement: ast.stmt, scope: Names) -> Iterator[tuple[str, str]]:
    """(module, name) for all that a statement may use; the module "" is its own."""
    own = _own(statement)
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            if node.id in own:
                continue
            module, name = scope.imports.get(node.id, ("", node.id))
            if name != "*":
                yield module, name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = scope.imports.get(node.value.id, ("", ""))
            if name == "*":
                yield module, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            module, name = scope.imports.get(getattr(node.args[0], "id", ""), ("", ""))
            if name == "*":  # whatever it will be called: all of the module
                names = _module(module)
                yield from ((module, n) for n in {*names.bound, *names.imports})


def _own(statement: ast.stmt) -> set[str]:
    """Names that a statement binds for itself: arguments, and what a function or a loop assigns."""
    own, again = set(), set()
    inner = isinstance(statement, ast.FunctionDef | ast.For | ast.With | ast.If)
    for node in ast.walk(statement):
        if isinstance(node, ast.arg):
            own.add(node.arg)
        elif isinstance(node, ast.comprehension):
            own |= {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
            again.add(node.target.id)
        elif inner and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
    return own - again


@functools.cache
def _module(name: str) -> Names:
    """The names of a module of the package, such as `attacks.gradient`; of one that shows, none."""
    path = PACKAGE.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if name in SHOWING or not file.is_file():
        return Names()
    return _names(ast.parse(file.read_text(encoding="utf-8")).body, name, path.is_dir())


def _names(statements: Iterable[ast.stmt], module: str = "", package: bool = False) -> Names:
    names = Names()
    for statement in statements:
        for node in ast.walk(statement):  # imports inside functions count as well
            if isinstance(node, ast.Import | ast.ImportFrom):
                names.imports |= _imported(node, module, package)
        for name in _binds(statement):
            names.bound.setdefault(name, []).append(statement)
    return names


def _imported(
    node: ast.Import | ast.ImportFrom, module: str, package: bool
) -> dict[str, tuple[str, str]]:
    """Aliases of what is imported from the package; a module itself is named `*`."""
    if isinstance(node, ast.Import):
        return {
            (a.asname or a.name): (a.name.removeprefix("defenses").lstrip("."), "*")
            for a in node.names
            if a.name.split(".")[0] == "defenses"
        }
    source = node.module or ""
    if node.level:
        base = module.split(".") if package else module.split(".")[:-1]
        base = base[: len(base) - node.level + 1]
        source = ".".join(part for part in [*base, source] if part)
    elif source.split(".")[0] != "defenses":
        return {}
    source = source.removeprefix("defenses").lstrip(".")
    found = {}
    for alias in node.names:
        inner = ".".join(part for part in (source, alias.name) if part)
        path = PACKAGE.joinpath(*inner.split("."))
        is_module = path.is_dir() or path.with_suffix(".py").is_file()
        # `from .jacobian import jacobian` names the function where the module has one
        found[alias.asname or alias.name] = (inner, "*") if is_module else (source, alias.name)
    return found


def _binds(statement: ast.stmt) -> set[str]:
    """The names that a top-level statement defines, assigns or changes; loops have their own."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    found: set[str] = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            base: ast.expr = node
            while isinstance(base, ast.Subscript | ast.Attribute):
                base = base.value
            found |= {base.id} if isinstance(base, ast.Name) else set()
    loops = [node.target for node in ast.walk(statement) if isinstance(node, ast.For)]
    return found - {n.id for target in loops for n in ast.walk(target) if isinstance(n, ast.Name)}


class _Bare(ast.NodeTransformer):
    """Takes docstrings out of a statement, and what stands `BESIDE`."""

    def __init__(self, scope: Names) -> None:
        self.scope = scope

    def beside(self, node: ast.expr) -> bool:
        name = node.func if isinstance(node, ast.Call) else node
        return isinstance(name, ast.Name) and self.scope.imports.get(name.id) in BESIDE

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        return node.args[0] if self.beside(node) else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if self.beside(node.value) else self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = [d for d in node.decorator_list if not self.beside(d)]
        return self.visit_ClassDef(node)

    def visit_ClassDef(self, node: ast.ClassDef | ast.FunctionDef) -> ast.AST:
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)
