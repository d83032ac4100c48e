"""The shape of the project, measured: `python tools/shape.py` prints it (`make shape`).

Of every notebook that exports a module: the cell (counted from 0) with the first result, that is, the first shown code cell that
uses a public name which the notebook exports and has a displayed output; the median lines of an exported cell (without blank lines
and `#|` lines); and how often shown cells call each public function, method and class that it exports (or read it, a property or a
constant has no call): twice is the aim. Of the package: literals of more than 30 lines, private names
taken from another module, circles of imports, and imports of a module that is read later. The tests assert that there are none
of the last four; the counts describe an aim."""

import ast
import re
from collections import Counter
from functools import cache
from statistics import median

import nbformat
from notebooks import ROOT, directives, notebooks

PACKAGE = ROOT / "oneshot_steering"
APART = {"__init__", "all", "_modidx"}  # made by hand or by nbdev; they import everything
FIRST_RESULT, LINES, SHOWN, LITERAL = 10, 15, 2, 30  # the aims


def exported_to(nb):
    "The module that a notebook exports, `organisms.coder`, or None."
    names = [d.split()[1] for cell in nb.cells for d in directives(cell) if d.startswith("default_exp")]
    return names[0] if names else None


@cache
def reading_order():
    "{module: notebook} in the order in which notebooks are read."
    read = {path: exported_to(nbformat.read(path, as_version=4)) for path in notebooks()}
    return {name: path for path, name in read.items() if name}


def shape_of(path):
    "First result, and the lengths of the exported cells."
    cells = nbformat.read(path, as_version=4).cells
    lengths, first = [], None
    public = re.compile(rf"\b({'|'.join(exported_names(cells))})\b")
    for number, cell in enumerate(cells):
        flags = directives(cell)
        if cell.cell_type != "code" or any(d.split()[0] in ("default_exp", "hide", "include:") for d in flags):
            continue
        if flags & {"export", "exporti"}:
            lines = [line for line in cell.source.splitlines() if line.strip() and not line.startswith("#|")]
            if not imports_only(cell.source):
                lengths.append(len(lines))
        elif first is None and cell.outputs and public.search(cell.source):
            first = number
    return first, lengths


def exported_names(cells):
    "Public functions, classes, methods and constants that exported cells define."
    for cell in cells:
        if "export" in directives(cell):
            for node in ast.parse(cell.source).body:
                targets = node.targets if isinstance(node, ast.Assign) else [node]
                for name in (getattr(t, "name", getattr(t, "id", "_")) for t in targets):
                    if not name.startswith("_"):
                        yield name


def shown_calls(path):
    "{public definition of a notebook: how often its shown cells use it}."
    cells = nbformat.read(path, as_version=4).cells
    used = Counter()
    for cell in cells:
        flags = directives(cell)
        if cell.cell_type == "code" and not flags & {"export", "exporti"} and not any(d.startswith("default_exp") for d in flags):
            used.update(names_used(cell.source))
    return {name: used[name] for name in dict.fromkeys(exported_names(cells))}


def names_used(source):
    "Every name and attribute that code reads."
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id


def imports_only(source):
    "Whether a cell has nothing but imports (some notebook commands are no Python: those are shown cells)."
    try:
        body = ast.parse(source).body
    except SyntaxError:
        return False
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


# --- the package -------------------------------------------------------------------------------------------------------------


@cache
def modules():
    "{name: syntax tree} of the modules that notebooks export."
    files = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
    return {name: ast.parse(p.read_text(encoding="utf-8")) for name, p in files.items() if name.split(".")[-1] not in APART}


def target(name, node):
    "The module of this package that an import statement of module `name` takes from, relative to the package: '' is the package itself."
    if node.level:
        above = name.split(".")[: -node.level]
        return ".".join([*above, *(node.module.split(".") if node.module else [])])
    if node.module and node.module.split(".")[0] == PACKAGE.name:
        return node.module.partition(".")[2]
    return None


def imports(name):
    "(module, name taken, local name, line) for each import from this package, those inside functions too."
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.ImportFrom) and (module := target(name, node)) is not None:
            for alias in node.names:
                inner = f"{module}.{alias.name}".lstrip(".")
                taken = (inner, None) if inner in modules() else (module, alias.name)
                yield *taken, alias.asname or alias.name, node.lineno


def graph():
    "{module: the modules that it imports}."
    return {name: {module for module, *_ in imports(name) if module in modules()} - {name} for name in modules()}


def circles():
    "Modules that import each other, directly or through others."
    edges, found = graph(), []

    def reach(name, seen):
        for module in edges[name] - seen:
            seen |= reach(module, seen | {module})
        return seen

    reached = {name: reach(name, set()) for name in edges}
    for name in edges:
        if name in reached[name]:
            found.append(name)
    return found


def against_the_order():
    "Imports of a module whose notebook is read later."
    place = {name: i for i, name in enumerate(reading_order())}
    return [f"{name} imports {module}" for name, below in graph().items() for module in sorted(below)
            if place.get(module, -1) > place.get(name, -1)]  # fmt: skip


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


@cache
def private_names(name):
    "Private names that a module defines: functions, classes, methods, fields, attributes that it sets."
    named = set()
    for node in ast.walk(modules()[name]):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            named.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            named.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            named.add(node.attr)
    return {n for n in named if is_private(n)}


def hooks(tree):
    "What classes take from themselves, `self._work`: a base class may leave it to those that derive from it."
    inside = (node for a_class in ast.walk(tree) if isinstance(a_class, ast.ClassDef) for node in ast.walk(a_class))
    return {node for node in inside if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"}


def private_across_modules():
    "Private names imported from another module, and private attributes that another module defines and this one does not."
    found = []
    for name, tree in modules().items():
        found += [f"{name}:{line} takes {module}.{taken}" for module, taken, _, line in imports(name) if taken and is_private(taken)]
        elsewhere = set().union(*(private_names(other) for other in modules() if other != name)) - private_names(name)
        own = hooks(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in elsewhere and node not in own:
                found.append(f"{name}:{node.lineno} uses {ast.unparse(node)}")
    return found


def long_literals():
    "Literal lists, tuples, sets, dictionaries and strings (not docstrings) of more than 30 lines."
    found = []

    def visit(name, node):
        parts = [n.value for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.Module)) for n in n.body[:1]
                 if isinstance(n, ast.Expr)]  # fmt: skip
        docstrings = set(map(id, parts))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Constant, ast.JoinedStr)) and id(child) not in docstrings:
                lines = child.end_lineno - child.lineno + 1
                if lines > LITERAL:
                    found.append(f"{name}:{child.lineno} has a literal of {lines} lines")
                    continue
            visit(name, child)

    for name, tree in modules().items():
        body = [node for node in tree.body if not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")]
        visit(name, ast.Module(body, []))
    return found


def main():
    print(f"{'notebook':28} first result   exported: cells   median lines   longest   definitions   used twice   never")
    core = []
    for path in reading_order().values():
        first, lengths = shape_of(path)
        late = " " if first is not None and first < FIRST_RESULT else "!"
        cells, middle, longest = len(lengths), median(lengths or [0]), max(lengths, default=0)
        calls = shown_calls(path)
        twice, never = sum(n >= SHOWN for n in calls.values()), [name for name, n in calls.items() if not n]
        print(f"{path.stem:28} {first!s:>9}{late} {cells:18} {middle:14g} {longest:9} {len(calls):13} {twice:12}   {', '.join(never)}")
        if path.stem[:2] <= "09":
            core.append((first, lengths, calls))
    lengths = [n for _, many, _ in core for n in many]
    calls = [n for *_, one in core for n in one.values()]
    late = sum(first is None or first >= FIRST_RESULT for first, *_ in core)
    print("\n00-09 together:")
    print(f"  {len(lengths)} exported cells, median {median(lengths):g} lines (aim: at most {LINES})")
    print(f"  {len(calls)} public definitions, used {sum(calls) / len(calls):.1f} times each in shown cells (aim: {SHOWN}); "
          f"{sum(n >= SHOWN for n in calls)} at least {SHOWN} times, {calls.count(0)} never")  # fmt: skip
    print(f"  {late} of {len(core)} notebooks with a first result after cell {FIRST_RESULT - 1}")
    for title, found in (
        ("literals over 30 lines", long_literals()),
        ("private names across modules", private_across_modules()),
        ("modules in circles", circles()),
        ("imports against the reading order", against_the_order()),
    ):
        print(f"{title}: {len(found) or 'none'}", *found, sep="\n  ")


if __name__ == "__main__":
    main()
