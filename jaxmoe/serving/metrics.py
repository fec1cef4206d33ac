"""Counts for Prometheus: requests, tokens, times, the engine's slots and pages, and the load of experts and devices."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxmoe.generation.requests import EngineCounts
from jaxmoe.placement import ExpertPlacement
from jaxmoe.placement.balance import max_over_mean
from jaxmoe.placement.balancer import Balancer
from jaxmoe.placement.traffic import device_loads

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Everything that /metrics tells.

    Args:
        counts: function that gives the engine's counts.
        loads: counts of experts; None where they are not recorded.
    """

    def __init__(self, counts: Callable[[], EngineCounts], loads: "ExpertLoads | None" = None):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(counts, loads))
        self._counts = counts

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, registry=self.registry, buckets=_SECONDS)

        self.responses = Counter(
            "jaxmoe_http_responses", "Answers, by path and status", ["path", "status"], registry=self.registry
        )
        self.choices = Counter(
            "jaxmoe_choices", "Generated texts, by the reason of their end", ["reason"], registry=self.registry
        )
        self.first_token = histogram("jaxmoe_time_to_first_token_seconds", "Time from a request to its first token")
        self.between_tokens = histogram("jaxmoe_time_between_tokens_seconds", "Time between tokens of a text, its mean")
        self.duration = histogram("jaxmoe_choice_seconds", "Time from a request to the end of its text")
        self._recent = 1.0  # seconds that a text has taken lately

    def watch(self) -> "Watch":
        """Begin to time one choice."""
        return Watch(self)

    def ended(self, seconds: float) -> None:
        """Take note of how long a text has taken."""
        self.duration.observe(seconds)
        self._recent += (seconds - self._recent) / 16

    def seconds_until_free(self) -> int:
        """About how long it takes until a slot becomes free; at least 1 and at most 60."""
        return int(min(max(self._recent / max(self._counts().slots, 1), 1), 60))

    def text(self) -> bytes:
        """The page, in Prometheus' own format."""
        return generate_latest(self.registry)


class Watch:
    """Times of one choice."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._begin = metrics, time.monotonic()
        self._first = self._last = 0.0
        self._tokens = 0
        self._ended = False

    def token(self) -> None:
        """Take note of a token."""
        self._last = time.monotonic()
        if not self._tokens:
            self._first = self._last
            self._metrics.first_token.observe(self._first - self._begin)
        self._tokens += 1

    def end(self, reason: str) -> None:
        """Take note of the end; only the first one counts."""
        if self._ended:
            return
        self._ended = True
        self._metrics.choices.labels(reason).inc()
        if self._tokens > 1:
            self._metrics.between_tokens.observe((self._last - self._first) / (self._tokens - 1))
        if reason != "canceled":
            self._metrics.ended(time.monotonic() - self._begin)


class ExpertLoads(Balancer):
    """A balancer that keeps counts of experts for /metrics, and moves experts where it is asked to.

    Args:
        rebalance: whether it proposes placements.
        placements: function that gives the placements of the model as they are.
        **settings: settings of `Balancer`.
    """

    def __init__(self, placements: Callable[[], Sequence[ExpertPlacement]], *, rebalance: bool, **settings: object):
        super().__init__(**settings)  # type: ignore[arg-type]
        self._placements_now, self._rebalance = placements, rebalance
        # Arrays are replaced and never changed: another thread reads them.
        self.total_LE: np.ndarray | None = None
        self._recent_LE: np.ndarray | None = None
        self.moves = 0

    def observe(self, counts_LE: np.ndarray) -> None:
        """Take note of one step's counts, [L, E]."""
        super().observe(counts_LE)
        counts = np.asarray(counts_LE, np.int64)
        if self.total_LE is None or self._recent_LE is None:
            self.total_LE, self._recent_LE = counts, counts.astype(np.float64)
        else:
            self.total_LE = self.total_LE + counts
            self._recent_LE = self._recent_LE * (1 - 1 / self.window) + counts

    def propose(self, placements: Sequence[ExpertPlacement]) -> list[ExpertPlacement] | None:
        """A better placement of every layer; None while there is no need, and where nothing is to be moved."""
        proposed = super().propose(placements) if self._rebalance else None
        self.moves += proposed is not None
        return proposed

    def unevenness(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Load of the busiest expert and of the busiest device over their means, [L] each, over about a window."""
        counts_LE = self._recent_LE
        if counts_LE is None:
            return None
        return max_over_mean(counts_LE), max_over_mean(device_loads(counts_LE, self._placements_now()))


class _EngineCollector(Collector):
    def __init__(self, counts: Callable[[], EngineCounts], loads: ExpertLoads | None):
        self._counts, self._loads = counts, loads

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        gauges = {
            "waiting": "Requests without a slot",
            "running": "Requests with a slot",
            "slots": "Slots",
            "pages_in_use": "Pages of the cache that running requests hold",
            "pages_cached": "Pages that are kept for prompts that begin alike",
            "pages": "Pages of the cache",
        }
        for name, text in gauges.items():
            yield GaugeMetricFamily(f"jaxmoe_{name}", text, value=getattr(counts, name))
        counters = {
            "prompt_tokens": "Tokens of prompts",
            "cached_tokens": "Tokens of prompts that were found in the cache",
            "generated_tokens": "Tokens that were generated",
            "preemptions": "Times that a request gave back its slot",
            "steps": "Programs of the model that were run",
        }
        for name, text in counters.items():
            yield CounterMetricFamily(f"jaxmoe_{name}", text, value=getattr(counts, name))
        if self._loads is not None:
            yield from _of_experts(self._loads)


def _of_experts(loads: ExpertLoads) -> Iterator[Metric]:
    yield CounterMetricFamily("jaxmoe_rebalances", "Times that experts were moved", value=loads.moves)
    experts = CounterMetricFamily(
        "jaxmoe_expert_tokens", "Choices of an expert by a token, zero experts left out", labels=["layer", "expert"]
    )
    if loads.total_LE is not None:
        for layer, row in enumerate(loads.total_LE.tolist()):
            for expert, count in enumerate(row):
                experts.add_metric([str(layer), str(expert)], count)
    yield experts
    expert_load = GaugeMetricFamily(
        "jaxmoe_expert_load_ratio", "Busiest expert over the mean, lately", labels=["layer"]
    )
    device_load = GaugeMetricFamily(
        "jaxmoe_device_load_ratio", "Busiest device over the mean, lately", labels=["layer"]
    )
    uneven = loads.unevenness()
    if uneven is not None:
        for family, values in zip((expert_load, device_load), uneven, strict=True):
            for layer, value in enumerate(values):
                family.add_metric([str(layer)], float(value))
    yield expert_load
    yield device_load
