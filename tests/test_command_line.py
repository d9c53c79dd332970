"""A user's error is one line and status 2; names and flags that are almost right are named."""

import argparse
import os
import subprocess
import sys

import pytest

from featdistill import command_line
from featdistill.__main__ import main as tools
from featdistill.command_line import Parser, UserError


def make_parser() -> Parser:
    parser = Parser(prog="x")
    parser.add_argument("--train", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=7, help="number of steps")
    return parser


def ending_of(main, arguments, monkeypatch) -> int:
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.run(main)
    return ended.value.code


def test_a_package_that_is_run_has_its_name_in_errors(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["/somewhere/featdistill/__main__.py", "fus"])
    with pytest.raises(SystemExit):
        command_line.run(tools)
    assert capsys.readouterr().err.startswith(
        "python -m featdistill: error: unknown tool 'fus' (did you mean fuse?)"
    )


@pytest.mark.parametrize(("result", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_status_is_what_main_returns(result, status, monkeypatch, capsys):
    assert ending_of(lambda arguments: result, [], monkeypatch) == status
    assert capsys.readouterr().err == ""


def test_main_is_called_with_the_arguments(monkeypatch):
    seen = []
    ending_of(seen.extend, ["--a", "b"], monkeypatch)
    assert seen == ["--a", "b"]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("no file\n  x.csv; make it"), "train.py: error: no file x.csv; make it\n"),
        (
            PermissionError(13, "Permission denied", "/out"),
            "train.py: error: /out: Permission denied; check its permissions\n",
        ),
        (
            OSError(28, "No space left on device", "/out/x.npy"),
            "train.py: error: /out/x.npy: No space left on device; make room, and run the same command "
            "again\n",
        ),
        (OSError(5, "Input/output error"), "train.py: error: Input/output error\n"),
        (OSError("no connection"), "train.py: error: no connection\n"),
    ],
)
def test_a_users_error_and_what_the_system_refuses_are_one_line_and_status_2(
    error, line, monkeypatch, capsys
):
    def main(arguments):
        raise error

    assert ending_of(main, ["--x"], monkeypatch) == 2
    output = capsys.readouterr()
    assert (output.out, output.err) == ("", line)


def test_debug_shows_the_traceback(monkeypatch):
    def main(arguments):
        raise UserError("wrong")

    monkeypatch.setattr("sys.argv", ["train.py", "--debug"])
    with pytest.raises(UserError, match="wrong"):
        command_line.run(main)


def test_an_unexpected_error_shows_its_traceback_and_has_a_status_of_its_own(monkeypatch, capsys):
    def main(arguments):
        raise ValueError("a defect")

    assert ending_of(main, [], monkeypatch) == 3
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2] == "ValueError: a defect" and "unexpected error" in lines[-1]


def run_program(body: str, **options) -> subprocess.CompletedProcess:
    program = (
        f"from featdistill import command_line\ndef main(arguments):\n    {body}\ncommand_line.run(main)"
    )
    return subprocess.run([sys.executable, "-c", program], capture_output=True, **options)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_text_that_the_output_cannot_encode_is_escaped(encoding):
    # The last name is how Python shows one on the disk that is not UTF-8.
    body = "print('é 日本 \\udcff'); print('next')"
    ended = run_program(body, env=os.environ | {"PYTHONIOENCODING": encoding})
    shown = "é 日本".encode(encoding, "backslashreplace") + rb" \udcff"
    assert (ended.returncode, ended.stdout.splitlines(), ended.stderr) == (0, [shown, b"next"], b"")


@pytest.mark.parametrize("lines", [2, 100_000])
def test_a_reader_that_closes_the_pipe_ends_the_program_without_a_word(lines, tmp_path):
    program = (
        "from featdistill import command_line\n"
        f"command_line.run(lambda arguments: [print('a line') for _ in range({lines})] and 0)"
    )
    read, write = os.pipe()
    os.close(read)
    with (tmp_path / "errors").open("wb") as errors:
        ended = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=errors)
    os.close(write)
    assert ended.returncode == 141 and not (tmp_path / "errors").read_bytes()


def test_an_interrupt_is_one_line_and_status_130(monkeypatch, capsys):
    def main(arguments):
        raise KeyboardInterrupt

    assert ending_of(main, [], monkeypatch) == 130
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trian", "a"], r"unknown argument --trian \(did you mean --train\?\); see --help"),
        (["--trian=a"], r"unknown argument --trian \(did you mean --train\?\)"),
        (["--tra", "a"], r"unknown argument --tra \(did you mean --train\?\)"),
        (["12345"], "unexpected argument 12345; see --help"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'; see --help"),
        (["--steps"], "argument --steps: expected one argument"),
    ],
)
def test_a_wrong_flag_is_an_error_that_names_it_and_the_nearest_one(arguments, message):
    with pytest.raises(UserError, match=message):
        make_parser().parse_args(arguments)


def test_a_missing_flag_is_named():
    parser = make_parser()
    parser.add_argument("--out", required=True)
    with pytest.raises(UserError, match="the following arguments are required: --out; see --help"):
        parser.parse_args([])


def test_right_flags_are_parsed_with_their_defaults():
    args = make_parser().parse_args(["--train", "a", "b"])
    assert args == argparse.Namespace(train=["a", "b"], steps=7, debug=False)


def test_help_names_the_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        make_parser().parse_args(["--help"])
    assert ended.value.code == 0
    assert "number of steps (default: 7)" in " ".join(capsys.readouterr().out.split())


def test_one_of_returns_a_known_name_and_names_the_nearest_of_an_unknown_one():
    known = {"val": 1, "val_hard": 2, "toy": 3}
    assert command_line.one_of("split", "toy", known) == "toy"
    with pytest.raises(UserError) as error:
        command_line.one_of("split", "val_hrad", known)
    assert str(error.value) == "unknown split 'val_hrad' (did you mean val_hard?); known: val, val_hard, toy"
    with pytest.raises(UserError) as error:
        command_line.one_of("split", "x", iter(known))
    assert str(error.value) == "unknown split 'x'; known: val, val_hard, toy"


def test_the_nearest_name_is_given_only_where_one_is_near():
    assert command_line.nearest("siglp", ["clip", "siglip"]) == " (did you mean siglip?)"
    assert command_line.nearest("zzz", ["clip", "siglip"]) == command_line.nearest("a", []) == ""
    assert command_line.nearest("nope", ["image", "name", "label"]) == ""


def test_a_default_is_shown_once():
    parser = Parser()
    parser.add_argument("--own-words", default=["pool"], help="what is kept (default: pool)")
    parser.add_argument("--plain", default=3, help="how many")
    assert parser.format_help().count("default") == 2


def test_a_bar_counts_images_and_may_be_silent(capsys):
    with command_line.progress(10, "verify", initial=4) as bar:
        bar.update(6)
    assert bar.n == bar.total == 10
    assert "img" in capsys.readouterr().err
    with command_line.progress(10, "verify", show=False) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("--limit", "0", "argument --limit: must be 1 or more, not 0"),
        ("--limit", "1.5", "argument --limit: must be a number 1 or more, not 1.5"),
        ("--share", "1", "argument --share: must be between 0 and 1, not 1"),
        ("--share", "nan", "argument --share: must be between 0 and 1, not nan"),
        ("--quality", "101", "argument --quality: must be from 1 to 100, not 101"),
    ],
)
def test_a_number_out_of_range_is_an_error_that_names_the_flag_and_the_range(flag, text, message):
    parser = Parser()
    parser.add_argument("--limit", type=command_line.within(1))
    parser.add_argument("--share", type=command_line.within(0, 1, float, exclusive=True))
    parser.add_argument("--quality", type=command_line.within(1, 100))
    args = parser.parse_args(["--limit", "3", "--share", "0.5", "--quality", "100"])
    assert (args.limit, args.share, args.quality) == (3, 0.5, 100)
    with pytest.raises(UserError, match=message):
        parser.parse_args([flag, text])


def test_a_number_of_workers_has_an_upper_bound():
    parser = Parser()
    parser.add_argument("--workers", type=command_line.worker_count(1))
    assert parser.parse_args(["--workers", "256"]).workers == 256
    for text in ("0", "257", "1000000"):
        with pytest.raises(UserError, match=f"--workers: must be from 1 to 256, not {text}"):
            parser.parse_args(["--workers", text])


def test_the_name_of_a_file_must_have_its_suffix():
    parser = Parser()
    parser.add_argument("--out", type=command_line.file_name(".png"))
    assert parser.parse_args(["--out", "a/b.PNG"]).out == "a/b.PNG"
    for text in ("a.jpg", "a", ".png"):
        with pytest.raises(UserError, match=r"must be the name of a \.png file"):
            parser.parse_args(["--out", text])


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [
        (0, "image", "0 images"),
        (1, "image", "1 image"),
        (1234, "cell", "1,234 cells"),
        (2, "copy", "2 copies"),
    ],
)
def test_a_number_has_its_noun_in_the_singular_or_the_plural(number, noun, text):
    assert command_line.counted(number, noun) == text


@pytest.mark.parametrize("again", [["--train", "b"], ["--train=b"]])
def test_a_list_given_twice_is_refused_rather_than_half_forgotten(again):
    with pytest.raises(UserError, match="--train is given twice; give it once, with all its values"):
        make_parser().parse_args(["--train", "a", *again])
    # The last of two single values counts, as scripts that add a flag to a command expect.
    assert make_parser().parse_args(["--steps", "1", "--steps", "2"]).steps == 2
