"""What Prometheus reads: requests by status, images, the queue, times, batches, and the process's memory."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The figures of one service.

    Args:
        queued: returns the images that are accepted and not answered yet.
        held_bytes: returns the bytes of the requests that are not decoded yet.
        is_ready: as `/readyz` says.
    """

    def __init__(
        self, queued: Callable[[], int], held_bytes: Callable[[], int], is_ready: Callable[[], bool]
    ) -> None:
        self._registry = CollectorRegistry()
        to = {"namespace": "featdistill", "registry": self._registry}
        self._requests = Counter(
            "requests", "requests to /v1/detect, and refused ones elsewhere, by status", ["status"], **to
        )
        self._images = Counter("images", "images, scored or broken", ["result"], **to)
        self._seconds = Histogram("request_seconds", "from the headers to the answer", buckets=_SECONDS, **to)
        self._batches = Histogram("batch_images", "images scored together", buckets=_IMAGES, **to)
        for name, text, function in (
            ("queued_images", "images that are accepted and not answered yet", queued),
            ("held_bytes", "bytes of requests that are not decoded yet", held_bytes),
            ("ready", "1 if /readyz says so", is_ready),
        ):
            Gauge(name, text, **to).set_function(function)
        ProcessCollector(registry=self._registry)

    def request(self, status: int, seconds: float) -> None:
        """Count a request to /v1/detect; 499 is one whose client left."""
        self._requests.labels(status).inc()
        self._seconds.observe(seconds)

    def refused(self, status: int) -> None:
        """Count a request to another path that was refused."""
        self._requests.labels(status).inc()

    def images(self, scored: int, broken: int) -> None:
        """Count the images of an answer."""
        self._images.labels("scored").inc(scored)
        self._images.labels("broken").inc(broken)

    def batch(self, images: int) -> None:
        """Count a batch."""
        self._batches.observe(images)

    def text(self) -> bytes:
        """Return all figures in Prometheus's text format."""
        return generate_latest(self._registry)
