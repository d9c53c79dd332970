"""The service: answers, statuses, limits, batches, and what operators see of it."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image
from service_clients import as_base64, form, picture, png, serving, until
from tiny_experts import save_tiny_expert

import predict
from featdistill.inference.detector import Detection, Detector
from featdistill.service import app
from featdistill.service import server as server_module
from featdistill.service.batching import Batcher

KEY = "a key of the tests"


@pytest.fixture(scope="module")
def expert(tmp_path_factory) -> str:
    return save_tiny_expert(tmp_path_factory.mktemp("expert") / "tiny")


@pytest.fixture(scope="module")
def detector(expert):
    return Detector.load(expert, device="cpu", batch_size=4)


@pytest.fixture(scope="module")
def running(detector):
    with serving(detector, max_mb=0.5, max_pixels=10_000, max_images=3) as running:
        yield running


@pytest.fixture
def slow(expert):
    """A detector that scores nothing, after its warm-up, until the event is set."""
    detector, event = Detector.load(expert, device="cpu", batch_size=4), threading.Event()
    rows, is_warm = detector.rows, []

    def wait(pictures):
        if is_warm:
            assert event.wait(20)
        is_warm.append(True)
        return rows(pictures)

    detector.rows = wait
    yield detector, event
    event.set()


def test_answers_are_those_of_predict_json(expert, tmp_path, capsys):
    names = [str(tmp_path / f"{number}.png") for number in range(3)]
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    (tmp_path / "broken.png").write_bytes(picture()[:100])
    names.append(str(tmp_path / "broken.png"))
    files = [(name, Path(name).read_bytes()) for name in names]
    predict.main([*names, "--experts", expert, "--device", "cpu", "--batch-size", "1", "--json"])
    expected = json.loads(capsys.readouterr().out)
    assert expected["experts"]["tiny"].pop("folder") == expert
    with serving(Detector.load(expert, device="cpu", batch_size=1)) as running:
        body, kind = form(*files)
        assert running.post(body, kind)[::2] == (200, expected)
        assert running.post(as_base64(*files), "application/json")[::2] == (200, expected)
        one = running.post(files[0][1])
        assert one.content == expected | {"images": [expected["images"][0] | {"name": "image 1"}]}
        about = running.get("/v1/info").content
        assert about["experts"] == expected["experts"] and about["limits"]["max_mb"] == 20
    assert "could not" not in str(expected["images"][0]) and "error" in expected["images"][3]


@pytest.mark.parametrize(
    ("body", "kind", "status", "reason"),
    [
        (picture(), "text/plain", 415, "text/plain is not supported"),
        (b"", "image/png", 400, "empty"),
        (b"not an image", "image/png", 422, "cannot identify"),
        (picture()[:-500], "image/png", 422, "could not be read"),
        (
            png(Image.new("1", (101, 100))),
            "image/png",
            413,
            "101 x 100 pixels are more than the limit of 10000",
        ),
        (png(Image.new("1", (20_000, 10_000))), "image/png", 413, "could not be read"),
        (b"0" * 600_000, "image/png", 413, "more than 0.5 MB"),
        (form(*[("a", b"")] * 4)[0], form()[1], 413, "Too many files"),
        (form()[0], form()[1], 400, ""),
        (form(("a", picture()))[0], "multipart/form-data", 400, "boundary"),
        (b"no form", form()[1], 400, ""),
        (as_base64(*[("a", b"")] * 4), "application/json", 413, "4 images"),
        (as_base64(), "application/json", 400, "no images"),
        (b'{"images": [{"data": 1}]}', "application/json", 400, "the JSON must be"),
        (b"[" * 100_000, "application/json", 400, "the JSON must be"),
        (b"\xff", "application/json", 400, "the JSON must be"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_its_status_and_a_reason(running, body, kind, status, reason):
    answer = running.post(body, kind)
    assert answer.status == status and reason in answer.content["error"]
    assert "\n" not in answer.content["error"] and answer.headers["x-request-id"]
    assert running.get("/healthz").status == running.post(picture()).status == 200


def test_data_that_is_not_base64_is_the_error_of_its_row(running):
    images = json.loads(as_base64(("a.png", picture())))["images"]
    body = json.dumps({"images": [{"data": "%%%"}, *images, {"name": "b.png", "data": "ä"}]})
    answer = running.post(body.encode(), "application/json")
    rows = answer.content["images"]
    assert answer.status == 200 and [row["name"] for row in rows] == ["image 1", "a.png", "b.png"]
    assert 0 < rows[1]["score"] < 1
    assert all(row["error"].startswith("its data is not base64") for row in (rows[0], rows[2]))


def test_other_paths_and_methods_are_refused_in_json_and_counted(running):
    for status, answer in (
        (404, running.get("/none")),
        (404, running.post(picture(), path="/v1/detect/")),
        (405, running.get("/v1/detect")),
        (405, running.post(picture(), path="/metrics")),
    ):
        assert answer.status == status and list(answer.content) == ["error"]
    assert running.get("/v1/detect").headers["allow"] == "POST"
    assert running.metric('featdistill_requests_total{status="404"}') == 2
    assert running.metric('featdistill_requests_total{status="405"}') == 3


def test_a_body_without_a_length_is_counted(running):
    chunks = (b"0" * 10_000 for _ in range(200))
    answer = running.post(chunks)  # http.client sends it chunked
    assert answer.status == 413 and answer.headers["connection"] == "close"
    assert running.service._held == running.service._queued == 0


def test_bytes_of_all_requests_are_limited(detector):
    with serving(detector, max_held_mb=0.001) as running:
        answer = running.post(picture())
        assert answer.status == 429 and answer.headers["retry-after"] == "1"
        assert running.post(picture(side=8)).status == 200


def test_only_health_is_answered_without_the_key(detector):
    with serving(detector, KEY) as running:
        for headers in ({}, {"x_api_key": KEY[:-1]}, {"Authorization": f"Basic {KEY}"}, {"x_api_key": "ä"}):
            answer = running.post(picture(), **headers)
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
            assert (
                running.get("/metrics", **headers).status == running.get("/v1/info", **headers).status == 401
            )
        for headers in ({"x_api_key": KEY}, {"Authorization": f"Bearer {KEY}"}):
            assert (
                running.post(picture(), **headers).status == running.get("/metrics", **headers).status == 200
            )
        assert running.get("/healthz").status == running.get("/readyz").status == 200


def test_images_of_several_requests_share_a_batch_and_are_not_mixed_up(slow):
    detector, event = slow
    with serving(detector, wait_ms=200) as running, ThreadPoolExecutor(9) as clients:
        first = clients.submit(running.post, picture(0))
        until(lambda: running.service._batcher._busy_since)
        rest = [clients.submit(running.post, picture(seed)) for seed in range(1, 9)]
        until(lambda: len(running.service._batcher._waiting) == 8)
        event.set()
        scores = [answer.result().content["images"][0]["score"] for answer in (first, *rest)]
        # The gray picture of the warm-up and the first one alone, then two full batches.
        assert running.metric("featdistill_batch_images_count") == 4
        assert running.metric('featdistill_batch_images_bucket{le="2.0"}') == 2
        assert running.metric('featdistill_requests_total{status="200"}') == 9
        assert running.metric('featdistill_images_total{result="scored"}') == 9
        assert running.metric("featdistill_queued_images") == 0 == running.metric("featdistill_held_bytes")
    expected = [detector(picture(seed)).score for seed in range(9)]
    assert scores == pytest.approx(expected, abs=1e-5) and len(set(scores)) == 9


def test_a_full_queue_and_a_late_answer_have_their_statuses(slow):
    detector, event = slow
    with serving(detector, queue=3, max_images=3, timeout=1.0) as running, ThreadPoolExecutor(3) as clients:
        body, kind = form(("a", picture()), ("b", picture(1)))
        late = [clients.submit(running.post, picture()), clients.submit(running.post, body, kind)]
        until(lambda: running.service._queued == 3)
        full = running.post(picture())
        assert full.status == 429 and full.headers["retry-after"] == "1"
        assert [answer.result().status for answer in late] == [504, 504]
        until(lambda: running.service._queued == 0 and not running.service._batcher._waiting)
        event.set()
        assert running.post(picture()).status == 200
        assert running.metric('featdistill_requests_total{status="504"}') == 2


def test_a_client_that_leaves_is_taken_out_of_the_queue(slow):
    detector, event = slow
    with serving(detector) as running, ThreadPoolExecutor(1) as clients:
        first = clients.submit(running.post, picture())
        until(lambda: running.service._batcher._busy_since)
        with pytest.raises(TimeoutError):
            running.post(picture(), timeout=0.3)
        until(lambda: running.service._queued == 1)
        assert not running.service._batcher._waiting
        assert running.metric('featdistill_requests_total{status="499"}') == 1
        event.set()
        assert first.result().status == 200


def test_slow_senders_are_cut_off(detector, monkeypatch):
    monkeypatch.setattr(server_module, "_HEADERS_S", 0.5)
    monkeypatch.setattr(app, "_DISCARD_S", 0.2)
    head = b"POST /v1/detect HTTP/1.1\r\nHost: here\r\nContent-Type: image/png\r\nContent-Length: 99\r\n\r\n"
    with serving(detector, timeout=0.5) as running:
        for sent, status in ((head + b"0", b"HTTP/1.1 408"), (head[:20], b""), (b"", b"")):
            with socket.create_connection(("127.0.0.1", running.port), timeout=10) as client:
                client.sendall(sent)
                start = time.monotonic()
                received = b"".join(iter(lambda client=client: client.recv(1000), b""))
                assert received.startswith(status) and time.monotonic() - start < 8
        assert running.post(picture()).status == 200


def test_many_clients_at_once_are_all_answered(running, detector):
    expected = [detector(picture(seed)).score for seed in range(8)]

    def client(number: int) -> list[float]:
        seeds = [(number + step) % 8 for step in range(6)]
        answers = [running.post(picture(seed)) for seed in seeds]
        return [
            abs(a.content["images"][0]["score"] - expected[s]) for a, s in zip(answers, seeds, strict=True)
        ]

    with ThreadPoolExecutor(24) as clients:
        differences = [value for part in clients.map(client, range(24)) for value in part]
    assert len(differences) == 144 and max(differences) < 1e-5


def test_a_batch_that_fails_is_tried_in_halves_and_failing_for_good_is_a_problem():
    class Fake:
        batch_size = 4
        broken = frozenset({3})

        def rows(self, pictures):
            if self.broken & set(pictures):
                raise RuntimeError("no memory")
            return [Detection(str(picture)) for picture in pictures]

    sizes = []
    batcher = Batcher(Fake(), 0.2, sizes.append)
    futures = [batcher.submit(number) for number in range(4)]
    assert [future.result(5).name for future in futures[:3]] == ["0", "1", "2"]
    with pytest.raises(RuntimeError, match="no memory"):
        futures[3].result(5)
    assert sizes == [4] and batcher.problem() is None
    for _ in range(3):
        batcher.submit(3).exception(5)
    assert batcher.problem() == "scoring has failed 4 times in a row"
    batcher.submit(1).result(5)
    assert batcher.problem() is None
    batcher.stop(5)
    assert batcher.problem() == "the scoring thread has ended"


def test_readiness_waits_for_the_first_image_and_ends_with_the_stop(slow):
    detector, event = slow
    detector.rows([detector.prepare(picture())])
    service = server_module.Service(detector, server_module.Limits())
    with service:
        assert service.why_not_ready() == "warming up"
        event.set()
        until(lambda: service.why_not_ready() is None)
        service.is_stopping = True
        assert service.why_not_ready() == "stopping"
