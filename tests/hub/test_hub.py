"""Experts that are pushed to a stand-in of the Hub, and scored with from there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import set_maker
from hub_server import TOKEN, Hub

from featdistill.command_line import UserError
from featdistill.hub import download
from featdistill.models.expert import create_expert, save_expert

ROOT = Path(__file__).resolve().parents[2]
# Runs commands one after the other, since PyTorch loads slowly.
CHILD = """
import contextlib, importlib, io, json, os, sys
from huggingface_hub import constants, utils
from featdistill import command_line
for line in sys.stdin:
    module, arguments, token, constants.HF_HUB_OFFLINE = json.loads(line)
    os.environ["HF_TOKEN"] = token
    getattr(utils, "reset_sessions", int)()  # of huggingface_hub 0, which remember
    sys.argv, out, err = [f"{module}.py", *arguments], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command_line.run(importlib.import_module(module).main)
        except SystemExit as end:
            status = end.code
    print(json.dumps([status, out.getvalue(), err.getvalue()]), flush=True)
"""


class Client:
    """Runs commands in a process whose Hub is the stand-in."""

    def __init__(self, endpoint: str, home: Path) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        own = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            cwd=ROOT,
            env=inherited | own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(
        self, module: str, *arguments: object, token: str = TOKEN, offline: bool = False
    ) -> tuple[int, str, str]:
        """Return status, standard output and standard error."""
        request = [module, [str(each) for each in arguments], token, offline]
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return tuple(json.loads(self.process.stdout.readline()))

    def error(self, module: str, *arguments: object, **settings: object) -> str:
        """Return the one line of an error that the user can fix."""
        status, _, err = self(module, *arguments, **settings)
        lines = [line for line in err.splitlines() if "error: " in line]
        assert status == 2 and len(lines) == 1 and "Traceback" not in err, err
        return lines[0].partition("error: ")[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub():
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub, root):
    client = Client(hub.url, root / "home")
    yield client
    client.process.kill()
    client.process.wait(60)


@pytest.fixture(scope="module")
def images(root) -> Path:
    return set_maker(root)("images", 6)


@pytest.fixture(scope="module")
def expert(root, images) -> Path:
    folder = root / "runs" / "stage1" / "tiny" / "expert"
    made = create_expert("tiny_clip", "random", input_size=32, head_hidden=8)
    data = {"train": [{"path": str(images), "sha256": "0" * 64}]}
    save_expert(made, folder, {"recipe": {"name": "tiny", "cache": str(root / "my cache")}, "data": data})
    return folder


@pytest.fixture(scope="module")
def files(expert) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in expert.iterdir()}


def scores(path: Path) -> list[str]:
    return path.read_text().splitlines()[1:]


PUSH = ("featdistill.__main__", "push")


def test_an_expert_goes_out_and_comes_back_with_equal_scores(client, hub, expert, images, root):
    status, out, err = client(*PUSH, expert, "me/tiny", "--license", "mit")
    assert status == 0, err
    commit = hub.repositories["me/tiny"].refs["main"]
    assert out == f"{hub.url}/me/tiny/commit/{commit}\nscore with --experts hub:me/tiny@{commit}\n"
    stored = hub.repositories["me/tiny"].files
    assert set(stored) == {"README.md", "expert.json", "expert.safetensors"}
    assert stored["expert.safetensors"] == (expert / "expert.safetensors").read_bytes()
    assert str(root).encode() not in stored["expert.json"] + stored["README.md"]

    for name, which in (("ours", expert), ("theirs", "hub:me/tiny")):
        arguments = ("--manifest", images, "--experts", which, "--out", root / f"{name}.csv")
        assert client("predict", *arguments, token="")[0] == 0
    assert scores(root / "ours.csv") == scores(root / "theirs.csv") and len(scores(root / "ours.csv")) == 6
    ours, theirs = (json.loads((root / f"{name}.csv.json").read_text()) for name in ("ours", "theirs"))
    assert theirs["experts"] == ours["experts"]
    assert theirs["hub"] == {"tiny": f"me/tiny@{commit}"} and "hub" not in ours

    before = len(hub.requests)
    arguments = ("--manifest", images, "--experts", f"hub:me/tiny@{commit}")
    assert "nothing to do" in client("predict", *arguments, "--out", root / "theirs.csv", offline=True)[1]
    arguments = ("--manifest", images, "--experts", "hub:me/tiny", "--out", root / "offline.csv")
    assert client("predict", *arguments, offline=True)[0] == 0
    assert scores(root / "offline.csv") == scores(root / "ours.csv") and len(hub.requests) == before


def test_a_second_push_replaces_the_expert_and_what_belonged_to_it(client, hub, expert, files):
    first = hub.add("me/twice", files | {"calibrator.json": b"{}", "sample.jpg": b"kept"})
    status, out, err = client(*PUSH, expert, "me/twice", "--message", "Better")
    assert status == 0 and out.startswith("me/twice has an expert; the new commit replaces it"), err
    repository = hub.repositories["me/twice"]
    assert (
        set(repository.files) == {*files, "README.md", "sample.jpg"}
        and "calibrator.json" in repository.commits[first]
    )


def test_a_run_is_not_continued_with_an_expert_that_has_changed(client, hub, files, images, root):
    first = hub.add("me/moving", files)
    arguments = ("--manifest", images, "--experts", "hub:me/moving", "--out", root / "moving.csv")
    assert client("predict", *arguments)[0] == 0
    second = hub.add("me/moving", {"README.md": b"changed"})
    message = client.error("predict", *arguments)
    assert f'hub.moving was "me/moving@{first}", is "me/moving@{second}"' in message
    assert "nothing to do" in client("predict", *arguments[:3], f"hub:me/moving@{first}", *arguments[4:])[1]


def test_weights_that_are_not_those_of_the_card_are_refused(client, hub, files, images):
    damaged = bytearray(files["expert.safetensors"])
    damaged[-1] ^= 1
    hub.add("me/tampered", files | {"expert.safetensors": bytes(damaged)})
    message = client.error("predict", "--manifest", images, "--experts", "hub:me/tampered")
    assert "models--me--tampered" in message and "its SHA-256 differs" in message
    message = client.error("predict", "x.jpg", "--experts", "hub:me/tampered")
    assert "its SHA-256 differs" in message


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("hub:me/nothing", "{url}/me/nothing does not exist or is private; check the name, or set HF_TOKEN"),
        ("hub:me/secret", "{url}/me/secret does not exist or is private"),
        ("hub:me/gated", "access to {url}/me/gated is granted on request"),
        ("hub:me/other", "{url}/me/other is not the repository of an expert: it has no expert.json"),
        ("hub:me/half", "{url}/me/half is not the repository of an expert: it has no expert.safetensors"),
        ("hub:me/half@v9", "{url}/me/half has no revision v9; leave out @v9 for the newest"),
        ("hub:tiny", "hub:tiny does not name a repository; write hub:OWNER/NAME"),
        ("hub:me/a--b", "cannot download hub:me/a--b"),
    ],
)
def test_an_error_is_one_line(client, hub, files, reference, message):
    hub.add("me/secret", files, private=True)
    hub.add("me/gated", files, gated=True)
    hub.add("me/other", {"model.bin": b""})
    hub.add("me/half", {"expert.json": files["expert.json"]})
    shown = client.error("predict", "x.jpg", "--experts", reference, token="")
    assert message.format(url=hub.url) in shown


def test_without_a_network_an_expert_that_is_not_in_the_cache_is_an_error(client):
    message = client.error("predict", "x.jpg", "--experts", "hub:me/unseen", offline=True)
    assert message.startswith("hub:me/unseen is not in the cache and cannot be downloaded (")
    assert "offline" in message


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hub:https://huggingface.co/me/tiny", "hub:me/tiny"),
        ("hub:https://huggingface.co/me/tiny/tree/v1", "hub:me/tiny@v1"),
        ("hub:me/tiny/expert", "hub:me/tiny"),
        ("hub:me/tiny @v1", "hub:me/tiny"),
        ("hub:me", None),
        ("hub:", None),
    ],
)
def test_the_nearest_form_of_a_reference_is_named(text, meant):
    with pytest.raises(UserError) as raised:
        download.parse(text)
    assert (f"(did you mean {meant}?)" if meant else "repository; write") in str(raised.value)
    assert "hub:OWNER/NAME@REVISION" in str(raised.value)


def test_a_revision_is_a_branch_a_tag_or_a_commit():
    assert download.parse("hub:me/tiny") == ("me/tiny", None)
    assert download.parse(Path("hub:me/tiny@refs/pr/1")) == ("me/tiny", "refs/pr/1")


def test_private_and_gated_repositories_are_read_with_a_token(client, hub, files, images):
    hub.add("me/mine", files, private=True, gated=True)
    image = images.parent / "00000.jpg"
    assert client("predict", image, "--experts", "hub:me/mine")[0] == 0


def test_every_command_that_takes_a_folder_takes_a_repository(client, hub, files, images, root):
    commit = hub.add("me/everywhere", files)
    where, bank = "hub:me/everywhere", root / "bank"
    picture = (images.parent / "00000.jpg", "--expert", where, "--out", root / "seen.png")
    assert client("featdistill.__main__", "explain", *picture)[0] == 0
    embed = ("featdistill.__main__", "embed", "--manifest", images, "--out", bank, "--expert")
    assert client(*embed, where)[0] == 0
    assert json.loads((bank / "bank.json").read_text())["weights"]["path"] == f"{where}@{commit}"
    run = ("--teacher", where, "--recipe", "demo_clip_a", "--epochs", 1, "--batch-size", 4, "--workers", 0)
    run += ("--train", images, "--val", images, "--out", root / "run")
    status, _, err = client("distill", *run)
    assert status == 0, err
    teacher = json.loads((root / "run" / "run.json").read_text())["teacher"]
    assert teacher["path"] == f"{where}@{commit}"
    attack = (images, "--expert", where, "--method", "pgd", "--steps", 1, "--out", root / "attacks")
    assert client("data_prep.hard_negatives", *attack)[0] == 0
    assert "published:ufd can only be scored with" in client.error(*embed, "published:ufd")
