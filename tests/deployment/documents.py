"""What the documentation tells its readers to type, and the tests that it names."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import typer.main

from deploy.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SHELL = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(fedbags [^`]+)`")
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)")
_KEYWORDS = {"do", "then", "else", "if", "while", "!", "sudo", "exec"}
_SEPARATORS = set(";&|()<>")


def shell_blocks(text: str) -> list[str]:
    """The ``sh`` blocks of a page."""
    return SHELL.findall(text)


def inline_commands(text: str) -> list[str]:
    """Commands within sentences and tables."""
    return INLINE.findall(FENCE.sub("", text))


def fedbags_commands(block: str) -> Iterator[list[str]]:
    """The arguments of every ``fedbags`` of a block; here-documents and other programs are passed over."""
    for line in _without_here_documents(block).replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        command: list[str] = []
        for token in [*lexer, ";"]:
            if not set(token) <= _SEPARATORS:
                command.append(token)
                continue
            while command and (command[0] in _KEYWORDS or re.match(r"\w+=", command[0])):
                command.pop(0)
            if command and command[0] == "fedbags":
                yield command[1:]
            command = []


def command_of(arguments: list[str]) -> tuple[click.Command, list[str]]:
    """The command, or group of commands, that is meant, and what follows its name.

    Raises:
        LookupError: there is none.
    """
    command, rest = typer.main.get_command(app), list(arguments)
    while hasattr(command, "commands") and rest and rest[0] != "--help":
        if command.name == "provision" and rest[0].endswith(".toml"):
            rest.insert(0, "build")  # `fedbags provision consortium.toml`
        name = rest.pop(0)
        if name not in command.commands:
            raise LookupError(f"no command {name!r}: fedbags {shlex.join(arguments)}")
        command = command.commands[name]
    return command, rest


def parse(arguments: list[str]) -> None:
    """Parse a whole command as ``fedbags`` would, without running it.

    Raises:
        LookupError: there is no such command.
        click.UsageError: an option or value that the command does not take, or an argument too few.
    """
    command, rest = command_of([argument for argument in arguments if argument != "..."])
    if "--help" not in rest:
        command.make_context("fedbags", rest)


def check_named(arguments: list[str]) -> None:
    """Check a command in a sentence, whose arguments may be left out.

    Raises:
        LookupError: there is no such command, or it has no such option.
    """
    command, rest = command_of(arguments)
    known = {name for parameter in command.params for name in parameter.opts}
    for token in rest:
        option = token.partition("=")[0].strip("[]|")
        if option.startswith("--") and option not in known | {"--help"}:
            raise LookupError(f"no option {option}: fedbags {shlex.join(arguments)}")


def tests_of(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def anchors(text: str) -> set[str]:
    """The anchors that a page's headings make, as GitHub does."""
    headings = re.findall(r"^#+ +(.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_here_documents(block: str) -> str:
    return re.sub(r"(<<'?(\w+)'?[^\n]*\n).*?^\2$", r"\1", block, flags=re.DOTALL | re.MULTILINE)
