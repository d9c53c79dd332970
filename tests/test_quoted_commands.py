"""Every command line that the project quotes exists, with its flags; so do files, links and settings."""

import ast
import importlib
import re
import sys
import textwrap
import tomllib

import pytest
from quoted_commands import DOCUMENTS, ROOT, Quote, code_of, quotes, spans_of

import featdistill
from featdistill.__main__ import TOOLS
from featdistill.command_line import Parser, UserError
from featdistill.training.recipe import list_recipes

QUOTES = quotes()
RECIPES = set(list_recipes())
PROGRAMS = [
    (".".join(path.relative_to(ROOT).with_suffix("").parts), "")
    for folder in ("", "data_prep", "studies", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "command_line.run(main)" in path.read_text(encoding="utf-8")
]
PROGRAMS += [("featdistill", tool) for tool in TOOLS]
# A word in capitals stands for a value, such as N for a number or NAME for a name.
_PLACEHOLDER = re.compile(r"[A-Z_]+")
# What a parser may have against values in a text: placeholders, and files that are not here.
_ONLY_HERE = re.compile(r"invalid \w+ value: '[A-Z_]+'|is not a folder|is not a file|does not exist; see")


class Parsed(Exception):
    """The program has accepted its arguments."""


@pytest.fixture
def parse(monkeypatch):
    """Return a function that hands arguments to a program and returns what its parser has against them."""
    parse_args = Parser.parse_args

    def only_parse(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "argv", list(sys.argv))

    def parse(module: str, arguments: list[str]) -> str:
        name = "featdistill.__main__" if module == "featdistill" else module
        try:
            importlib.import_module(name).main(arguments)
        except (Parsed, SystemExit):  # --help exits
            return ""
        except UserError as error:
            return str(error)
        return ""

    return parse


def complaint(parse, quote: Quote) -> str:
    """Return what is wrong with a quoted command line, or nothing."""
    module, arguments = quote.module, list(quote.arguments)
    if module == "data_prep" or arguments[:1] in (["{}"], ["TOOL"]):  # python -m data_prep.<name>
        return ""
    if module.startswith("featdistill."):
        return "the package's commands are run as python -m featdistill TOOL"
    if (module, "") not in PROGRAMS and module != "featdistill":
        return "this program does not exist"
    if "--recipe" in arguments:
        names = arguments[arguments.index("--recipe") + 1 :]
        for name in names[: next((n for n, word in enumerate(names) if word.startswith("--")), None)]:
            if re.fullmatch(r"[\w/]+", name) and not _PLACEHOLDER.fullmatch(name) and name not in RECIPES:
                return f"the recipe {name} does not exist"
    if quote.is_complete:
        message = parse(module, arguments)
        return "" if _ONLY_HERE.search(message) else message
    tool = arguments[:1] if module == "featdistill" else []
    flags = [match.group() for word in arguments if (match := re.match(r"--[\w-]+", word))]
    messages = [parse(module, tool), *(parse(module, [*tool, flag]) for flag in flags)]
    return next((message for message in messages if message.startswith("unknown")), "")


def test_commands_are_found_in_documents_docstrings_messages_and_scripts():
    files = {quote.where.partition(":")[0] for quote in QUOTES}
    assert {"README.md", "docs/training.md", "predict.py", "run_all.sh", "benchmarks/inference.py"} <= files
    assert len(QUOTES) > 100 and sum(quote.is_complete for quote in QUOTES) > 60


def test_every_quoted_command_exists_with_its_flags(parse):
    wrong = {quote: complaint(parse, quote) for quote in QUOTES}
    assert not [f"{quote}: {message}" for quote, message in wrong.items() if message]


@pytest.mark.parametrize(
    ("module", "arguments", "is_complete", "message"),
    [
        ("fuse", ("--predictions", "a.csv"), False, "does not exist"),
        ("featdistill", ("melt", "--out", "a.json"), False, "unknown tool"),
        ("featdistill.inference.fusion", (), False, "featdistill TOOL"),
        ("predict", ("--image", "a.jpg"), False, "unknown argument --image"),
        ("train", ("--recipe", "clip_l14", "..."), False, "clip_l14 does not exist"),
        ("data_prep.audit", ("a.csv",), True, "--out"),
        ("predict", ("--split", "NAME", "--batch-size", "N"), True, ""),
    ],
)
def test_a_wrong_command_would_be_noticed(parse, module, arguments, is_complete, message):
    result = complaint(parse, Quote("here", module, arguments, is_complete))
    assert message in result and bool(message) == bool(result)


def test_every_flag_that_documents_name_belongs_to_a_program(parse):
    spans = {span for path in DOCUMENTS for span in spans_of(path.read_text(encoding="utf-8"))}
    flags = {flag for span in spans for flag in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    unknown = {
        flag
        for flag in flags
        if all("unknown argument" in parse(module, [tool, flag][not tool :]) for module, tool in PROGRAMS)
    }
    assert not unknown


def test_settings_of_run_all_and_extras_exist():
    script = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for path in DOCUMENTS:
        code = "\n".join(code_of(path))
        for settings in re.findall(r"((?:[A-Z]+=\S+ )*)bash run_all\.sh((?: [A-Z]+=\S+)*)", code):
            for name in re.findall(r"([A-Z]+)=", " ".join(settings)):
                assert f"${{{name}:" in script, f"{path.name}: run_all.sh does not know {name}"
        for names in re.findall(r"pip install \"?\.\[([\w,]+)\]", code):
            assert set(names.split(",")) <= set(extras), path.name
        for name in re.findall(r"-r (requirements\S*)", code):
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_paths_in_documents_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
    folders = {entry.name for entry in ROOT.iterdir() if entry.is_dir()} - {"data", "runs"}
    for span in spans_of(text):
        if re.fullmatch(r"[\w./*-]+/[\w./*-]*", span) and span.split("/")[0] in folders:
            assert list(ROOT.glob(span)), f"{path.name} names {span}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_names_that_python_examples_import_exist(path):
    for block in re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for node in ast.walk(ast.parse(textwrap.dedent(block) if "def " not in block else "")):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                assert {alias.name for alias in node.names} <= set(dir(module)), node.module
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "featdistill":
                assert node.attr in dir(featdistill)
