"""`--help` of every command answers without importing what only the work itself needs."""

import json
import os
import subprocess
import sys

import pytest
from quoted_commands import ROOT
from test_quoted_commands import PROGRAMS

HEAVY = {"torch", "timm", "open_clip", "accelerate", "pandas", "sklearn", "matplotlib", "gradio"}
# Commands that still import some of these.
KNOWN = {
    "data_prep.aigcdetect",
    "data_prep.audit",
    "data_prep.combine",
    "data_prep.community_forensics",
    "data_prep.deepfake60k",
    "data_prep.defactify",
    "data_prep.demo",
    "data_prep.diffface",
    "data_prep.distort_split",
    "data_prep.ditfake",
    "data_prep.equalise",
    "data_prep.equalize",
    "data_prep.folders",
    "data_prep.genimage",
    "data_prep.hard_negatives",
    "data_prep.ntire",
    "data_prep.openfake",
    "data_prep.pack",
    "data_prep.universalfakedetect",
}
# Each command in a child process of its own, which starts with nothing imported but this.
SCRIPT = """
import contextlib, importlib, io, json, os, sys
heavy, programs = json.loads(sys.argv.pop())
for module, tool in programs:
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
    commands = {f"{module} {tool}".strip(): (module, tool) for module, tool in PROGRAMS}
    programs = [
        program
        for command, program in commands.items()
        if command not in KNOWN and not command.startswith(("benchmarks", "studies"))
    ]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([sorted(HEAVY), programs])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = dict(map(json.loads, result.stdout.splitlines()))
    assert imported == {command: [] for command in imported} and len(imported) == len(programs)
