"""Print the size and shape of the source tree next to the targets of the project.

    python benchmarks/house.py [--tree DIR] [--list WHAT]

Every figure is read from the syntax trees of `common`, `client`, `server`, `deploy` and `fedbags.py`.
Nothing of the product is run.
"""

import argparse
import ast
import io
import statistics
import tokenize
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("common", "client", "server", "deploy")
LISTS = ("questions", "riders", "imports", "modules", "arguments", "cycles")
QUESTIONS = ("what", "which", "who", "whose", "how", "where", "when", "why", "whether")
MISSED = """\
Missed: modules, lines and public names. The targets were set on a tree of 189 modules and 26.8k lines.
What holds every promise against the server, and a hospital with counts only, took 8k lines after that,
and the parts 2k, so "before new features" never came. 22 modules went all the same; the merges that are
left (gate with executor, control with submit, rounds with app) would put two concepts into one module.
Nearly all public names are used outside of their modules, and the rest are parts, protocols and results;
fewer would need larger classes, not better ones."""
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = ast.Module | ast.ClassDef | Function
Import = ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Source:
    """Hold one parsed module."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def lines(self) -> int:
        """Return the number of lines of the file."""
        return self.text.count("\n")


def sources(root: Path) -> list[Source]:
    """Return every product module below `root`, in order of path."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    if (root / "fedbags.py").is_file():
        paths.append(root / "fedbags.py")
    found = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        found.append(Source(path.relative_to(root), text, ast.parse(text)))
    return found


def summaries(source: Source) -> Iterator[tuple[int, str]]:
    """Yield line number and summary, the first paragraph, of every docstring of a module."""
    for node in ast.walk(source.tree):
        if isinstance(node, Documented):
            docstring = ast.get_docstring(node)
            if docstring:
                line = node.body[0].lineno
                yield line, " ".join(docstring.split("\n\n")[0].split())


def asks(summary: str) -> bool:
    """Tell whether a summary opens with a question word."""
    first = summary.split()[0].strip("`*,.:;").lower()
    return first in QUESTIONS


def rides(summary: str) -> bool:
    """Tell whether a summary carries a second statement after a semicolon or a colon."""
    return ";" in summary or ": " in summary or summary.endswith(":")


def public_names(source: Source) -> list[str]:
    """Return the module-level functions and classes that do not begin with an underscore."""
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    return [
        node.name for node in source.tree.body if isinstance(node, kinds) and not node.name.startswith("_")
    ]


def deferred_imports(source: Source) -> list[int]:
    """Return the lines of imports that stand inside functions."""
    lines = set()
    for node in ast.walk(source.tree):
        if isinstance(node, Function):
            lines |= {inner.lineno for inner in ast.walk(node) if isinstance(inner, Import)}
    return sorted(lines)


def comment_lines(source: Source) -> int:
    """Return the number of lines that hold nothing but a comment."""
    tokens = tokenize.generate_tokens(io.StringIO(source.text).readline)
    return sum(
        token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() for token in tokens
    )


def many_arguments(source: Source, limit: int = 5) -> list[tuple[int, str, int]]:
    """Return line, name and number of arguments of functions that take more than `limit`."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, Function):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > limit:
                found.append((node.lineno, node.name, count))
    return found


def module_name(path: Path) -> str:
    """Return the dotted name under which a file is imported."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: Source, known: set[str]) -> set[str]:
    """Return the product modules that a module imports at any depth, deferred imports too."""
    names: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return (names & known) - {module_name(source.path)}


def cycles(modules: list[Source]) -> list[list[str]]:
    """Return every group of modules that import each other, found by Tarjan's algorithm."""
    known = {module_name(source.path) for source in modules}
    arrows = {module_name(source.path): sorted(imported(source, known)) for source in modules}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in arrows[name]:
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                groups.append(sorted(group))

    for name in arrows:
        if name not in index:
            visit(name)
    return groups


def table(modules: list[Source]) -> list[tuple[str, str, str]]:
    """Return the rows (figure, value now, target) of the house's table."""
    full = [source for source in modules if source.path.name != "__init__.py" or source.lines > 3]
    lines = sorted(source.lines for source in full)
    total = sum(source.lines for source in modules)
    folders = Counter(str(source.path.parent) for source in full)
    crowded, most = folders.most_common(1)[0]
    names = sum(len(public_names(source)) for source in modules)
    spoken = [summary for source in modules for _, summary in summaries(source)]
    deferred = {source.path: len(deferred_imports(source)) for source in modules}
    comments = sum(comment_lines(source) for source in modules)
    short = sum(source.lines < 60 for source in full)
    arguments = sum(len(many_arguments(source)) for source in modules)
    return [
        ("modules", str(len(full)), "<= 120"),
        ("lines", str(total), "<= 24000 before new features"),
        ("modules in the fullest folder", f"{most} ({crowded})", "<= 15"),
        ("folders with more than 15 modules", str(sum(count > 15 for count in folders.values())), "0"),
        (
            "lines of a module, median / p90 / max",
            f"{statistics.median(lines):.0f} / {lines[int(0.9 * len(lines))]} / {lines[-1]}",
            "120-450",
        ),
        ("modules under 60 lines", str(short), "only whole concepts"),
        ("public names per 1000 lines", f"{1000 * names / total:.1f}", "<= 17"),
        (
            "summaries that open with a question word",
            f"{sum(map(asks, spoken))} of {len(spoken)} ({sum(map(asks, spoken)) / len(spoken):.1%})",
            "0",
        ),
        ("summaries with a rider", f"{sum(map(rides, spoken)) / len(spoken):.1%}", "<= 9 %"),
        ("own-line comments", f"{comments / total:.1%} of lines", ">= 2 %"),
        (
            "imports inside functions",
            f"{sum(deferred.values())} in {sum(map(bool, deferred.values()))} files",
            "<= 40",
        ),
        ("import cycles, deferred imports included", str(len(cycles(modules))), "0"),
        ("functions with more than five arguments", str(arguments), "0 unmarked (PLR0913)"),
    ]


def details(modules: list[Source], kind: str) -> Iterator[str]:
    """Yield one line for every place that counts towards a figure."""
    for source in modules:
        if kind == "questions":
            yield from (f"{source.path}:{line}: {text}" for line, text in summaries(source) if asks(text))
        elif kind == "riders":
            yield from (f"{source.path}:{line}: {text}" for line, text in summaries(source) if rides(text))
        elif kind == "imports":
            yield from (f"{source.path}:{line}" for line in deferred_imports(source))
        elif kind == "arguments":
            yield from (f"{source.path}:{line}: {name} takes {n}" for line, name, n in many_arguments(source))
        else:
            yield f"{source.lines:5} {source.path}"


def main() -> None:
    """Print the table, or the places behind one of its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1])
    parser.add_argument(
        "--list", choices=("questions", "riders", "imports", "modules", "arguments", "cycles")
    )
    options = parser.parse_args()
    modules = sources(options.tree)
    if options.list == "cycles":
        for group in cycles(modules):
            print(" <-> ".join(group))
    elif options.list:
        print(*details(modules, options.list), sep="\n")
    else:
        for figure, value, target in table(modules):
            print(f"{figure:44} {value:32} {target}")
        print(f"\n{MISSED}")


if __name__ == "__main__":
    main()
