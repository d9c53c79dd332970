"""`--help` of every command answers without importing what only the work itself needs."""

import json
import os
import subprocess
import sys

import pytest
from quoted_commands import ROOT
from test_quoted_commands import PROGRAMS

# The commands of data_prep are about tables: pandas, a third of a second, is all that they may import.
HEAVY = {"torch", "timm", "open_clip", "accelerate", "pandas", "sklearn", "matplotlib", "gradio"}
# Each command in a child process of its own, which starts with what all may import.
SCRIPT = """
import contextlib, importlib, io, json, os, sys
import cv2, numpy, featdistill.command_line
heavy, programs = json.loads(sys.argv.pop())
for module, tool in sorted(programs, key=lambda program: program[0].startswith("data_prep")):
    if module.startswith("data_prep"):
        import data_prep.writing.source
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        print(json.dumps([f"{module} {tool}".strip(), json.load(open(reader))]))
        os.waitpid(child, 0)
    else:
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
            name = "featdistill.__main__" if module == "featdistill" else module
            importlib.import_module(name).main([tool, "--help"][not tool:])
        os.write(writer, json.dumps(sorted({*heavy} & {*sys.modules})).encode())
        os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_help_imports_nothing_heavy():
    # Benchmarks and studies are not meant for newcomers.
    programs = [program for program in PROGRAMS if not program[0].startswith(("benchmarks", "studies"))]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([sorted(HEAVY), programs])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = dict(map(json.loads, result.stdout.splitlines()))
    assert len(imported) == len(programs)
    for command, names in imported.items():
        assert set(names) <= ({"pandas"} if command.startswith("data_prep") else set()), command
