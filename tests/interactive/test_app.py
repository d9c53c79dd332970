"""The page: what is read and refused, what is scored and distorted, and all of it driven in a browser."""

import dataclasses
import importlib.util
import io
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_experts import save_tiny_pair

import app
from featdistill.calibration import Calibrator
from featdistill.command_line import UserError
from featdistill.distortions.libraries import LIBRARIES
from featdistill.distortions.plan import Step, apply_plan
from featdistill.images.credentials import Credentials
from featdistill.images.reading import BrokenImage, decode
from featdistill.inference.detector import Detection, Detector
from featdistill.interactive import page as app_page
from featdistill.interactive import session as interactive

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 2**20
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> list[str]:
    return save_tiny_pair(tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def detector(experts):
    return Detector.load(*experts, device="cpu", batch_size=1)


@pytest.fixture
def picture(make_set) -> Path:
    return make_set("pictures", 1).parent / "00000.jpg"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_that_are_too_large_or_not_images_are_refused_in_one_line():
    bomb = io.BytesIO()
    Image.new("1", (9_500, 9_500)).save(bomb, "PNG")
    for data, reason in (
        (b"\xff" * (LIMIT + 1), "larger than 1 MB"),
        (b"", "the file is empty"),
        (b"no image", "cannot identify"),
        (bomb.getvalue(), "9500 x 9500 pixels are more than the limit"),
    ):
        with pytest.raises(BrokenImage, match=reason) as refused:
            interactive.open_image(data, LIMIT)
        assert "\n" not in str(refused.value)


def test_every_operation_that_can_be_applied_here_is_offered_and_described():
    names = interactive.operation_names()
    assert (
        len(set(names))
        == len(names)
        == sum(not operation.missing() for library in LIBRARIES.values() for operation in library.values())
    )
    assert {name.partition("/")[0] for name in names} == set(LIBRARIES)
    for name in names:
        assert re.fullmatch(r".+ At level 4: [-0-9.e+]+\.", interactive.describe(name, 4))


def test_a_distortion_is_the_librarys_own_and_leaves_the_image_alone(picture):
    image = decode(picture.read_bytes())
    before = image.copy()
    for name, library, operation in (
        ("official/jpeg", "official", "jpeg"),
        ("evaluation/randomcrop", "evaluation", "randomcrop"),
    ):
        expected = apply_plan(image, (Step(library, operation, 4, 0),))
        assert np.array_equal(interactive.distort(image, name, 4), expected)
    assert np.array_equal(image, before)
    with pytest.raises(UserError, match=r"official/jpg' \(did you mean official/jpeg\?\)"):
        interactive.distort(image, "official/jpg", 4)
    with pytest.raises(UserError, match="the level must be 1 to 5, not 6"):
        interactive.distort(image, "official/jpeg", 6)


def test_the_table_has_one_row_per_expert_and_escapes_their_names():
    table = interactive.score_table(
        Detection("a", 0.5, 0.0, {"<b>a</b>": 0.99999, "b": 0.25}),
        Detection("a", 0.25, -1.1, {"<b>a</b>": 0.5, "b": 0.25001}),
    )
    assert "<b>a" not in table and table.count("<tr>") == 4
    rows = [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in table.split("</tr>")]
    assert rows[:4] == [
        "P(AI) original distorted change",
        "all experts 0.500 0.250 -0.250",
        "&lt;b&gt;a&lt;/b&gt; 0.999 0.500 -0.500",
        "b 0.250 0.250 0.000",
    ]
    certain = {1e-9: "0.001", 0.0: "0.000", 1 - 1e-9: "0.999", 1.0: "1.000"}
    assert {value: interactive.shown(value) for value in certain} == certain


def test_an_upload_is_scored_and_its_file_removed_even_if_it_is_refused(detector, picture, tmp_path):
    good, bad = tmp_path / "good <i>.jpg", tmp_path / "bad.jpg"
    shutil.copy(picture, good)
    bad.write_bytes(b"no image")
    kept, said, about, table, before, after = app_page.score_upload(detector, str(good), LIMIT)
    assert "Verdict" not in about
    score = interactive.shown(kept[1].score)
    assert "good &lt;i&gt;.jpg, 88 x 72 px: P(AI) " + score in said and score in table
    assert before.shape == (72, 88, 3) and after is None
    said, table, shown = app_page.score_distorted(detector, kept, "official/darken", 5, LIMIT)
    assert f"official/darken, level 5: P(AI) from {score} to " in said and table.count("<tr>") == 4
    assert shown.mean() < before.mean() - 10
    refused = app_page.score_upload(detector, str(bad), LIMIT)
    assert refused[0] is None and 'role="alert"' in refused[1] and "bad.jpg could not be read" in refused[1]
    assert not good.exists() and not bad.exists()
    assert "Drop an image first" in app_page.score_distorted(detector, None, "official/jpeg", 3, LIMIT)[0]


def test_a_verdict_its_promise_and_the_stability_are_said_in_plain_words(detector, picture, tmp_path):
    logit = detector(str(picture)).logit
    for low, high, verdict in (
        (-99, logit - 1, "AI-generated"),
        (logit + 1, 99, "real"),
        (-99, 99, "unsure"),
    ):
        calibrator = Calibrator(None, high, low, 0.05, 0.1, None, {}, 100, 100)
        judge = Detector(detector.predictor, calibrator)
        shutil.copy(picture, tmp_path / "good.jpg")
        kept, _, about, *_ = app_page.score_upload(judge, str(tmp_path / "good.jpg"), LIMIT)
        assert f"Verdict: {verdict}" in about and "At most 5 % of real images" in about
        said = app_page.score_copies(judge, kept)
        assert "In 20 re-delivered copies, P(AI) is " in said and "The verdict " in said
    assert "Content Credentials need the package c2pa-python" in about
    row = dataclasses.replace(kept[1], credentials=Credentials("invalid", problems=("<b>",)))
    assert "not valid: &lt;b&gt;." in interactive.judgment(row)
    assert "Drop an image first" in app_page.score_copies(detector, None)


def test_an_image_too_small_to_be_distorted_is_scored_all_the_same(detector, tmp_path):
    Image.new("RGB", (40, 9)).save(tmp_path / "strip.png")
    kept, said, *_ = app_page.score_upload(detector, str(tmp_path / "strip.png"), LIMIT)
    assert "P(AI)" in said
    said, table, shown = app_page.score_distorted(detector, kept, "official/jpeg", 3, LIMIT)
    assert "too small to be delivered again" in app_page.score_copies(detector, kept)
    assert "40 x 9 px are too small" in said and "P(AI)" in table and shown is None


def test_the_command_line_refuses_bad_values_and_warns_about_other_hosts(experts, monkeypatch, caplog):
    asked = ["--experts", experts[0], "--device", "cpu"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"app\.py needs the package gradio; run pip install gradio"):
        app.main(asked)
    served = []
    monkeypatch.setattr(app_page, "require_gradio", lambda: None)
    monkeypatch.setattr(app_page, "serve", lambda *arguments: served.append(arguments[1:]))
    app.main(asked)
    assert served == [("127.0.0.1", 7860, 20 * 2**20)] and not caplog.text
    app.main([*asked, "--host", "0.0.0.0", "--port", "80", "--max-mb", "0.5"])
    assert served[1] == ("0.0.0.0", 80, 2**19) and "everyone who can reach 0.0.0.0" in caplog.text
    for flags, reason in ((["--port", "0"], "--port: must be"), (["--max-mb", "0"], "--max-mb: must be")):
        with pytest.raises(UserError, match=reason):
            app.main([*asked, *flags])
    with pytest.raises(UserError, match="no experts are given"):
        app.main([])


@pytest.fixture(scope="module")
def address(experts, tmp_path_factory):
    """The page's address, served by a process of its own; skips, saying so, where something is missing."""
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("app")
    log, calibrator = folder / "app.log", folder / "calibrator.json"
    Calibrator(None, 700.0, -700.0, 0.05, 0.1, None, {}, 100, 100).save(calibrator)
    command = [sys.executable, "app.py", "--experts", *experts, "--port", str(port), "--max-mb", "1"]
    command += ["--calibrator", str(calibrator)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, "--device", "cpu"], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(30)
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def browser(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM_FLAGS)
        yield started
        started.close()


@pytest.mark.parametrize("width_px", [1280, 390])
def test_the_page_scores_distorts_and_refuses_in_a_browser(address, browser, picture, tmp_path, width_px):
    bad, large = tmp_path / "bad.jpg", tmp_path / "large.jpg"
    bad.write_bytes(b"no image")
    large.write_bytes(picture.read_bytes() + bytes(LIMIT))
    page = browser.new_page(viewport={"width": width_px, "height": 850})
    faults, hosts = [], set()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: hosts.add(request.url.split("/")[2]) if "://" in request.url else None)
    page.goto(address)
    message, upload = page.locator("#message"), page.locator("input[type=file]")
    message.get_by_text("Drop an image.").wait_for()
    assert "It is not proof" in page.inner_text("body")

    upload.set_input_files(picture)
    message.get_by_text("00000.jpg, 88 x 72 px: P(AI)").wait_for()
    page.locator("#before img").wait_for()
    assert page.locator("#scores tbody tr").count() == 3
    page.get_by_text("Verdict: unsure").wait_for()
    page.locator("#deliver").click()
    page.get_by_text("The verdict stays the same in all of them.").wait_for()
    before = page.locator("#scores tbody").inner_text()

    page.get_by_label("Distortion").click()
    page.get_by_label("Distortion").fill("official/darken")
    page.get_by_role("option", name="official/darken").click()
    page.get_by_role("spinbutton").fill("5")
    page.get_by_role("spinbutton").press("Enter")
    page.get_by_text("At level 5: 0.8.").wait_for()
    page.locator("#distort").click()
    message.get_by_text("official/darken, level 5: P(AI) from").wait_for()
    page.locator("#after img").wait_for()
    assert page.locator("#after img").get_attribute("alt") == "The distorted image"
    assert page.locator("#scores tbody").inner_text() != before

    assert page.evaluate("document.documentElement.scrollWidth") <= width_px
    upload.set_input_files(bad)
    message.get_by_text("bad.jpg could not be read").wait_for()
    assert "Traceback" not in page.inner_text("body") and page.locator("#before img").count() == 0
    upload.set_input_files(large)
    page.get_by_text("exceed the maximum allowed size").wait_for()
    assert "large.jpg" not in message.inner_text()
    assert not faults and hosts == {address.split("/")[2]}
