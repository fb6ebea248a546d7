"""What `/metrics` tells, in Prometheus' words. No label holds a text or a path that a client chose."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from longclip_rt.serving.batcher import Ran

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server; of all its workers where PROMETHEUS_MULTIPROC_DIR is set, as `serve --workers` does."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.several = bool(os.environ.get("PROMETHEUS_MULTIPROC_DIR"))
        if not self.several:
            ProcessCollector(registry=self.registry)  # memory, file descriptors, CPU time
        given: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("longclip_requests", "Requests answered.", ("route", "status"), **given)
        self.errors = Counter("longclip_errors", "Requests answered with an error.", ("code",), **given)
        self.seconds = Histogram(
            "longclip_request_seconds", "Time of a request.", ("route",), buckets=_SECONDS, **given
        )
        self.stages = Histogram(
            "longclip_stage_seconds",
            "Time of a request's tokenizing and decoding (prepare), of an input's wait for its batch (wait), and of a "
            "batch in the encoder (encode).",
            ("stage", "kind"),
            buckets=_SECONDS,
            **given,
        )
        self.rows = Histogram("longclip_batch_inputs", "Inputs of a batch.", ("kind",), buckets=_ROWS, **given)
        self.inputs = Counter("longclip_inputs", "Texts and images embedded.", ("kind",), **given)
        self.padded = Counter("longclip_padded_tokens", "Tokens encoded, padding included.", **given)
        self.tokens = Counter("longclip_tokens", "Tokens of the texts, as read.", **given)
        self.truncated = Counter("longclip_truncated_texts", "Texts that were cut to the context length.", **given)
        self.queue = Gauge(
            "longclip_queue_inputs", "Inputs that wait for a batch.", ("kind",), multiprocess_mode="livesum", **given
        )
        self.admitted = Gauge(
            "longclip_admitted_inputs", "Inputs let in and not answered.", multiprocess_mode="livesum", **given
        )

    def ran(self, kind: str) -> Callable[[Ran], None]:
        """Counts the batches of a kind."""

        def count(ran: Ran) -> None:
            self.rows.labels(kind).observe(ran.rows)
            self.inputs.labels(kind).inc(ran.rows)
            self.stages.labels("encode", kind).observe(ran.seconds)
            for wait in ran.waits:
                self.stages.labels("wait", kind).observe(wait)
            if kind == "text":
                self.padded.inc(ran.rows * ran.length)

        return count

    def text(self) -> bytes:
        """The page."""
        if not self.several:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
