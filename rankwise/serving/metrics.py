"""What a server tells Prometheus of itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_GAUGES = ("running", "waiting", "cache_tokens", "cached_tokens", "prefix_tokens")


class Metrics:
    """Of one server: what is counted here, and what engine and pool count themselves.

    No series is by adapter: there may be thousands.
    """

    def __init__(self, engine: Any, pool: Any) -> None:
        self.engine, self.pool = engine, pool
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.requests = Counter("rankwise_http_requests", "Answers by route and status.", ["route", "status"], **own)
        self.first = Histogram(
            "rankwise_time_to_first_token_seconds", "From a request to its first token.", buckets=_SECONDS, **own
        )
        self.whole = Histogram("rankwise_request_seconds", "From a request to its end.", buckets=_SECONDS, **own)
        self.cut_off = Counter("rankwise_disconnects", "Requests whose client left before the end.", **own)
        self._registry.register(self)

    def collect(self) -> Iterator[Any]:
        """Engine and pool, as prometheus_client asks its collectors."""
        for name, value in self.engine.figures.items():
            kind = GaugeMetricFamily if name in _GAUGES else CounterMetricFamily
            yield kind(f"rankwise_engine_{name}", f"Of the engine: {name.replace('_', ' ')}.", value=value)
        yield GaugeMetricFamily("rankwise_adapters", "Adapters that are served.", value=len(self.pool.names))
        yield GaugeMetricFamily("rankwise_adapters_resident", "Of them in memory.", value=len(self.pool.resident))
        for name, value in asdict(self.pool.figures).items():
            yield CounterMetricFamily(
                f"rankwise_adapter_{name}", f"Of the pool: {name.replace('_', ' ')}.", value=value
            )

    def text(self) -> bytes:
        return bytes(generate_latest(self._registry))
