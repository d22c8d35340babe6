"""The Prometheus metrics named `be_serve_*`. They appear on /metrics together with vLLM's own."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

from be_serve.core.errors import BEError
from be_serve.serving.cost import Cost

_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)


class Metrics:
    """The plugin's collectors. One instance per process, because Prometheus refuses a second registration."""

    def __init__(self) -> None:
        self.requests = Counter(
            "be_serve_requests",
            "Chats by how their token was named: be_id, alias, match; plain: none; fallback, match_missed: the prompt.",
            ["path", "how"],
        )
        self.injection = Histogram(
            "be_serve_injection_seconds",
            "Time from the parsed request to the engine input, without rendering and tokenising.",
            buckets=_SECONDS,
        )
        self.injection_cpu = Histogram(
            "be_serve_injection_cpu_seconds",
            "Processor time of the same work, without waiting for the processor, for a lock or for rows.",
            buckets=_SECONDS,
        )
        self.info = Gauge(
            "be_serve_info", "1, with the injection that this server uses.", ["injection"], multiprocess_mode="livemax"
        )
        self.cache = Counter(
            "be_serve_registry_lookups", "Vectors found in memory (hit) or read from the registry (miss).", ["result"]
        )
        self.refusals = Counter(
            "be_serve_refusals", "Requests that the plugin refused, admin routes included, by error code.", ["code"]
        )
        self.refreshed = Gauge(
            "be_serve_registry_refreshed_timestamp_seconds",
            "When the registry was last read. If this is long ago, changes and removals do not arrive.",
            multiprocess_mode="livemin",
        )
        self.inflight = Gauge(
            "be_serve_inflight_bytes",
            "Bytes of vectors that running requests with tokens hold; --be-inflight-bytes is the limit.",
            multiprocess_mode="livesum",
        )
        self.row_writes = Counter("be_serve_row_writes", "Tokens written into rows of the workers.")
        self.resident = Gauge(
            "be_serve_resident_tokens", "Tokens that lie in rows of the workers.", multiprocess_mode="livesum"
        )
        self.tokens = Gauge("be_serve_tokens", "Tokens this server can name.", multiprocess_mode="livemostrecent")

    def observe_rows(self, resident: int, written: int) -> None:
        """Set the number of tokens in rows, and add to the count of written tokens."""
        self.row_writes.inc(written)
        self.resident.set(resident)

    def injected(self, cost: Cost) -> None:
        """Record the time of one request with a token."""
        self.injection.observe(cost.wall)
        self.injection_cpu.observe(cost.cpu)

    def refused(self, exc: BEError) -> None:
        """Count a refusal."""
        self.refusals.labels(code=exc.code).inc()


_instance: Metrics | None = None


def metrics() -> Metrics:
    """The process's metrics, created on first use. Prometheus' multiprocess mode must be set up before."""
    global _instance
    if _instance is None:
        _instance = Metrics()
    return _instance
