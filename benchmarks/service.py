"""The HTTP service under many clients, and under hostile ones; it is started here, on this machine only.

    python benchmarks/service.py --experts runs/paper/stage2/*/expert              64 clients for a minute
    python benchmarks/service.py --experts runs/paper/stage2/*/expert --hostile    bombs, slow senders, crowds

The first measures one client that sends one request at a time, then `--clients` at once, each for
`--seconds`; every answer is compared with that of `predict.py --json`. The second sends what a service must
survive, and says which statuses came back, and how much memory the process had at most. Without `--images`,
synthetic scenes are written as JPEGs.
"""

import asyncio
import collections
import contextlib
import functools
import http.client
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scenes import jpegs
from featdistill import command_line
from featdistill.command_line import Parser, UserError, within

ROOT = Path(__file__).resolve().parents[1]
# Last bits depend on the size of a batch; this is far below what a verdict or a rounded score shows.
TOLERANCE = 1e-5
_STARTS_WITHIN_S = 300


def build_parser() -> Parser:
    parser = Parser(description="Throughput, delays and resilience of the HTTP service.")
    parser.add_argument("--experts", nargs="+", required=True, metavar="DIR", help="experts' folders")
    parser.add_argument("--images", metavar="DIR", help="JPEGs to send; default: synthetic scenes")
    parser.add_argument("--megapixels", type=within(0.01, 20, float), default=0.66, help="of the scenes")
    parser.add_argument("--count", type=within(1, 256), default=32, help="number of different images")
    parser.add_argument("--clients", type=within(1, 256), default=64, help="that send at the same time")
    parser.add_argument("--seconds", type=within(1, 600, float), default=60.0, help="for each figure")
    parser.add_argument("--device", default="cpu", help="of the service")
    parser.add_argument("--batch-size", type=within(1), default=32, metavar="N", help="of the service")
    parser.add_argument("--timeout", type=within(1, 600, float), default=30.0, help="of the service, in s")
    parser.add_argument("--hostile", action="store_true", help="send what a service must survive")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        paths = jpegs(args.images, args.count, folder, args.megapixels)
        images = [Path(path).read_bytes() for path in paths]
        with serving(args) as (process, port):
            if args.hostile:
                return asyncio.run(survive(process.pid, port, images[0]))
            expected = predicted(args, paths)
            return measure(args, process.pid, port, images, expected)


@contextlib.contextmanager
def serving(args) -> Iterator[tuple[subprocess.Popen, int]]:
    """Run the service on a free port until the block ends; yields its process and port."""
    command = [sys.executable, "-m", "featdistill", "serve", "--experts", *args.experts, "--port", "0"]
    command += ["--device", args.device, "--batch-size", str(args.batch_size)]
    command += ["--timeout", str(args.timeout)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        lines = (json.loads(line) for line in process.stdout)
        url = next((line["url"] for line in lines if line["event"] == "listening"), None)
        if url is None:
            raise UserError("the service has not started")
        port = int(url.rpartition(":")[2])
        # Otherwise its log would fill the pipe.
        threading.Thread(target=collections.deque, args=(process.stdout, 0), daemon=True).start()
        end = time.monotonic() + _STARTS_WITHIN_S
        while get(port, "/readyz") != 200 and time.monotonic() < end:
            time.sleep(0.1)
        yield process, port
    finally:
        process.terminate()
        status = process.wait(60)
    print(f"stopped with status {status}")


def predicted(args, paths: Sequence[str]) -> list[float]:
    """Return the scores of `predict.py --json`."""
    command = [sys.executable, "predict.py", *map(str, paths), "--json", "--experts", *args.experts]
    command += ["--device", args.device, "--batch-size", str(args.batch_size)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [row["score"] for row in json.loads(output)["images"]]


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().status


def measure(args, pid: int, port: int, images: list[bytes], expected: list[float]) -> int:
    """Measure one client, then many; return 1 if an answer is missing or wrong."""
    print(f"{len(images)} images of {np.mean([len(data) for data in images]) / 1024:.0f} KiB on average")
    rates, wrong = [], 0
    for clients in (1, args.clients):
        start = time.monotonic()
        answers, lost = load(port, clients, args.seconds, images)
        if not answers:
            raise UserError(f"none of {lost} requests was answered; use a longer --timeout")
        delays_ms = [1000 * delay for _, _, delay in answers]
        difference = max(abs(score - expected[index]) for index, score, _ in answers)
        rates.append(len(answers) / (time.monotonic() - start))
        p50, p95 = np.percentile(delays_ms, (50, 95))
        print(
            f"{clients} at a time: {rates[-1]:.2f} images/s, p50 {p50:.0f} ms, p95 {p95:.0f} ms, "
            f"{len(answers)} answers, {lost} lost, largest difference from predict.py {difference:.1e}"
        )
        wrong += lost + (difference > TOLERANCE)
    print(f"ratio {rates[1] / rates[0]:.2f}; peak memory of the service {peak_mib(pid)} MiB")
    return int(wrong > 0)


def load(
    port: int, clients: int, seconds: float, images: list[bytes]
) -> tuple[list[tuple[int, float, float]], int]:
    """Let clients send one request after the other.

    Returns:
        Index of the image, score and seconds of each answer; and how many requests got none.
    """
    answers, lost = [], []
    end = time.monotonic() + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=660)
        index = number
        while (start := time.monotonic()) < end:
            index = (index + 1) % len(images)
            try:
                connection.request("POST", "/v1/detect", images[index], {"Content-Type": "image/jpeg"})
                answer = connection.getresponse()
                content = json.loads(answer.read())
                score = content["images"][0]["score"]
            except (OSError, http.client.HTTPException, LookupError, ValueError) as error:
                lost.append(error)
                connection.close()
                time.sleep(0.1)
                continue
            answers.append((index, score, time.monotonic() - start))
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, len(lost)


async def survive(pid: int, port: int, image: bytes) -> int:
    """Send what hostile clients send; return 1 if a status is wrong or the service does not work after it."""
    start_mib, failed = peak_mib(pid), 0
    cases = [
        ("an image", {200}, 1, lambda: post(port, image)),
        ("a truncated image", {422}, 1, lambda: post(port, image[: len(image) // 2])),
        ("a wrong type", {415}, 1, lambda: post(port, image, "text/html")),
        ("no HTTP", {400}, 1, lambda: exchange(port, b"\x16\x03\x01 hello\r\n\r\n")),
        ("one color, 81 megapixels", {413}, 1, lambda: post(port, one_color(9000), "image/png")),
        ("a header of 900 megapixels", {413}, 1, lambda: post(port, one_color(30_000), "image/png")),
        ("200 MB with a length", {413}, 1, lambda: post(port, bytes(200 * 2**20))),
        ("200 MB in chunks", {413}, 1, lambda: exchange(port, head("image/png", None), chunked(200))),
        ("JSON in JSON in JSON", {400}, 1, lambda: post(port, b"[" * 10**6, "application/json")),
        ("a slow sender", {408}, 1, lambda: exchange(port, head("image/png", 1000), trickle(1000))),
        (
            "64 that stop at 19 MB",  # one that is refused may notice too late why
            {0, 408, 429},
            64,
            lambda: exchange(port, head("image/png", 20 * 2**20), stalled(19)),
        ),
        ("200 that send no request", {0}, 200, lambda: exchange(port, b"POST /v1")),
        ("32 of 49 megapixels at once", {200, 504}, 32, lambda: post(port, one_color(7000), "image/png")),
        ("1,000 at once", {200, 429, 504}, 1000, lambda: post(port, image)),
        ("an image", {200}, 1, lambda: post(port, image)),
    ]
    for name, allowed, count, send in cases:
        start = time.monotonic()
        statuses = collections.Counter(await asyncio.gather(*(send() for _ in range(count))))
        healthy = await asyncio.to_thread(get, port, "/healthz") == 200
        failed += not (set(statuses) <= allowed and healthy)
        shown = ", ".join(f"{status or 'closed'} x {times}" for status, times in sorted(statuses.items()))
        print(
            f"{name:28} {shown:32} {time.monotonic() - start:5.1f} s  peak {peak_mib(pid)} MiB"
            f"{'' if set(statuses) <= allowed else '  WRONG'}{'' if healthy else '  NOT HEALTHY'}",
            flush=True,
        )
    print(f"peak memory {start_mib} MiB before, {peak_mib(pid)} MiB after")
    return int(failed > 0)


def head(kind: str, length: int | None) -> bytes:
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST /v1/detect HTTP/1.1\r\nHost: here\r\nContent-Type: {kind}\r\n{size}\r\n\r\n".encode()


async def post(port: int, body: bytes, kind: str = "image/jpeg") -> int:
    return await exchange(port, head(kind, len(body)), pieces(body))


async def exchange(port: int, start: bytes, rest: AsyncIterator[bytes] | None = None) -> int:
    """Send bytes and return the status that comes back, or 0 if the connection is closed without any.

    Reads while it sends, as a client should that wants to see why it is refused.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def send() -> None:
        with contextlib.suppress(OSError):
            writer.write(start)
            async for piece in rest or pieces(b""):
                writer.write(piece)
                await writer.drain()

    sending = asyncio.ensure_future(send())
    try:
        async with asyncio.timeout(120):
            line = await reader.readline()
    except OSError:
        line = b""
    sending.cancel()
    writer.close()
    return int(line.split()[1]) if line else 0


async def pieces(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 2**20):
        yield body[start : start + 2**20]


async def chunked(mib: int) -> AsyncIterator[bytes]:
    for _ in range(mib):
        yield b"100000\r\n" + bytes(2**20) + b"\r\n"


async def stalled(mib: int) -> AsyncIterator[bytes]:
    yield bytes(mib * 2**20)
    await asyncio.sleep(600)


async def trickle(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"0"
        await asyncio.sleep(0.5)


@functools.cache
def one_color(side: int) -> bytes:
    """Return a PNG of side x side pixels, one bit each, which is a thousand times smaller than its pixels."""
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    return file.getvalue()


def peak_mib(pid: int) -> int:
    """Return the largest resident memory that a process has had, where the system says so (Linux)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) // 1024
    return 0


if __name__ == "__main__":
    command_line.run(main)
