"""The container: its steps are those of README, it is not root, and it starts a command that exists."""

import json
import re
from pathlib import Path

import pytest

from featdistill.command_line import Parser
from featdistill.service import flags

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile: name and arguments."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines)]


def test_what_is_installed_is_what_readme_says(steps):
    defaults = dict(re.fullmatch(r'(\w+)="(.*)"', value).groups() for name, value in steps if name == "ARG")
    assert defaults == {"TORCH_INDEX": "", "EXTRAS": "serve"}
    runs = [value for name, value in steps if name == "RUN" and value.startswith("pip")]
    runs = [run.replace("--no-cache-dir ", "").replace("$EXTRAS", defaults["EXTRAS"]) for run in runs]
    assert runs == ["pip install -r requirements.txt", 'pip install ".[serve]"']
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(run in readme for run in runs)


def test_all_that_is_copied_is_there_and_not_ignored(steps):
    copied = [path for name, value in steps if name == "COPY" for path in value.split()[:-1]]
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert set(copied) == allowed and all((ROOT / path).exists() for path in copied)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'readme = "README.md"' in project and 'include = ["featdistill*"]' in project


def test_it_starts_the_service_as_somebody_who_is_not_root_and_asks_for_its_health(steps, monkeypatch):
    names = [name for name, _ in steps]
    assert dict(steps)["USER"] == "featdistill"
    assert names.index("USER") < names.index("ENTRYPOINT") and "root" not in dict(steps).values()
    program, _, package, tool, *arguments = json.loads(dict(steps)["ENTRYPOINT"])
    assert (program, package, tool) == ("python", "featdistill", "serve")
    parser = Parser()
    flags.add_arguments(parser)
    args = parser.parse_args([*arguments, "--experts", "expert"])
    monkeypatch.setenv(flags.KEY_VARIABLE, "a key of the container")
    flags.check(args)
    check = dict(steps)["HEALTHCHECK"]
    assert f"http://127.0.0.1:{args.port}/healthz" in check and dict(steps)["EXPOSE"] == str(args.port)
