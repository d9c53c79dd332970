"""The command lines that the project quotes: in documents, docstrings, messages, recipes and run_all.sh."""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
SOURCES = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("tests", "build")]
OTHERS = [*(ROOT / "featdistill" / "recipes").rglob("*.yaml"), ROOT / "run_all.sh"]

_COMMAND = re.compile(
    r'(?:(?:python3?|"\$PYTHON") -m (?P<module>[\w.]*\w)|(?<![\w./])(?P<script>(?:\w+/)*\w+)\.py)'
    r"(?P<arguments>[^;`()|&]*)"
)
# What a program's name comes after, where it is a script and not merely mentioned.
_LAUNCHER = re.compile(r'(?:.* )?(?:python3?|"\$PYTHON"|(?:launch|torchrun)(?: --\w+ \d+)*) ')
_MODULES_OF_OTHERS = ("accelerate.commands.launch", "pip", "venv", "http.server")
# Something is left out, or a shell or Python inserts it.
_GAP = re.compile(r"\.\.\.|[${}<>\[\]]")


@dataclass(frozen=True)
class Quote:
    """A command line that a text quotes.

    Attributes:
        where: the file, and the line of the string.
        module: import name of the program.
        arguments: the words after it; within a sentence, up to the next bracket or semicolon.
        is_complete: it is a line of its own, with flags and without gaps, so all of it can be parsed.
    """

    where: str
    module: str
    arguments: tuple[str, ...]
    is_complete: bool


def quotes() -> list[Quote]:
    """Return all command lines that the project quotes, each once per file."""
    texts = [(str(path.relative_to(ROOT)), text) for path in DOCUMENTS for text in code_of(path)]
    texts += [
        (f"{path.relative_to(ROOT)}:{line}", text) for path in SOURCES for line, text in strings_of(path)
    ]
    texts += [(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in OTHERS]
    return list(dict.fromkeys(quote for where, text in texts for quote in _quotes_in(text, where)))


def code_of(path: Path) -> list[str]:
    """Return the code in a Markdown file, indented: its blocks, and its spans as one line each."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    indented = ["\n".join(f"    {line}" for line in block.split("\n")) for block in blocks]
    return indented + [f"    {span}" for span in spans_of(text)]


def spans_of(markdown: str) -> list[str]:
    """Return the code spans in a Markdown text, outside code blocks."""
    return [
        " ".join(span.split())
        for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL))
    ]


def strings_of(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of every string in a source file, with {} where an f-string inserts a value."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            texts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
            found.append((node.lineno, "".join(texts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found.append((node.lineno, node.value))
    return found


def _quotes_in(text: str, where: str) -> list[Quote]:
    found = []
    for line in re.sub(r"\\\n\s*", "", text).split("\n"):
        # What follows a comment sign or a gap of three spaces explains the command.
        code = re.split(r"\s#|\s{3,}(?=[^-\s])", line.strip())[0]
        for match in _COMMAND.finditer(code):
            launcher, arguments = code[: match.start()], match["arguments"].strip()
            is_launched = bool(match["module"] or _LAUNCHER.fullmatch(launcher))
            if match["module"] in _MODULES_OF_OTHERS or not (is_launched or arguments.startswith("--")):
                continue
            module = match["module"] or match["script"].replace("/", ".")
            is_line = is_launched and line.startswith("    ") and match.end() == len(code)
            is_complete = is_line and "--" in arguments and not _GAP.search(arguments)
            found.append(Quote(where, module, _words(arguments), is_complete))
    return found


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError:  # an apostrophe in a sentence
        return tuple(text.split())
