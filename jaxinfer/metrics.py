"""What /metrics shows: vLLM's names under `jaxinfer:`, in Prometheus' text format.

Numbers of the engine are read when somebody asks. Latencies are counted here, in plain lists: an observation is a
bisection and two additions, cheap enough for one a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxinfer.engine import EngineStats
from jaxinfer.request import RequestMetrics

# Upper bounds; vLLM's, rounded to what tells something on one machine.
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_TOKEN = (0.001, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_REQUEST = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Histogram:
    """Counts of values below fixed bounds."""

    def __init__(self, name: str, text: str, bounds: tuple[float, ...]):
        self.name, self.text, self.bounds = name, text, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def family(self, labels: dict[str, str]) -> HistogramMetricFamily:
        total, buckets = 0, []
        for bound, count in zip([*map(str, map(float, self.bounds)), "+Inf"], self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        family = HistogramMetricFamily(f"jaxinfer:{self.name}", self.text, labels=list(labels))
        family.add_metric(list(labels.values()), buckets, self.sum)
        return family


class Metrics(Collector):
    """The counters of one server. Written and read on its event loop.

    Args:
        model_name: the label of every number. stats: the engine's own; None while there is no engine.
    """

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]):
        self.labels = {"model_name": model_name}
        self.stats = stats
        self.finished: Counter[str] = Counter()
        self.first_token = Histogram("time_to_first_token_seconds", "From arrival to a request's first token.", _FIRST_TOKEN)
        self.inter_token = Histogram(
            "inter_token_latency_seconds", "Between two successive outputs of a streamed request, as they are sent.", _TOKEN
        )
        self.per_token = Histogram(
            "time_per_output_token_seconds", "Of one request: seconds a token after the first, mean.", _TOKEN
        )
        self.request = Histogram("e2e_request_latency_seconds", "From arrival to a request's last token.", _REQUEST)
        self.queue = Histogram("request_queue_time_seconds", "From arrival to the first step a request is part of.", _REQUEST)
        self.prompt_tokens = Histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self.generation_tokens = Histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def request_done(self, arrival: float, metrics: RequestMetrics, reason: str, prompt: int, generated: int) -> None:
        """Count a finished request: its arrival (seconds since the epoch), its times, and its tokens."""
        self.finished[reason] += 1
        self.prompt_tokens.observe(prompt)
        self.generation_tokens.observe(generated)
        if metrics.first_scheduled_time is not None:
            self.queue.observe(max(0.0, metrics.first_scheduled_time - arrival))
        if metrics.first_token_time is None or metrics.finished_time is None:
            return
        self.first_token.observe(max(0.0, metrics.first_token_time - arrival))
        self.request.observe(max(0.0, metrics.finished_time - arrival))
        if generated > 1:
            self.per_token.observe(max(0.0, metrics.finished_time - metrics.first_token_time) / (generated - 1))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

    def describe(self) -> list[Metric]:
        return []  # the registry need not call `collect` to learn the names

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        if stats is not None:
            yield from self._engine(stats)
        success = CounterMetricFamily(
            "jaxinfer:request_success", "Requests answered, by why they ended.", labels=[*self.labels, "finished_reason"]
        )
        for reason in sorted({"stop", "length", *self.finished}):
            success.add_metric([*self.labels.values(), reason], self.finished[reason])
        yield success
        for histogram in (
            self.first_token, self.inter_token, self.per_token, self.request, self.queue, self.prompt_tokens,
            self.generation_tokens,
        ):  # fmt: skip
            yield histogram.family(self.labels)

    def _engine(self, stats: EngineStats) -> Iterator[Metric]:
        cache = "Share of the KV cache's pages in use; 1 is all of them."
        gauges: list[tuple[str, str, float | None]] = [
            ("num_requests_running", "Sequences in the running batch.", stats.num_requests_running),
            ("num_requests_waiting", "Sequences waiting for a place in it.", stats.num_requests_waiting),
            ("kv_cache_usage_perc", cache, stats.gpu_cache_usage_perc),
            ("gpu_cache_usage_perc", cache + " The same number under vLLM's older name.", stats.gpu_cache_usage_perc),
            (
                "decode_bandwidth_fraction",
                "Bytes a decode step must read, over its time, as a fraction of the device's measured read limit.",
                stats.decode_bandwidth_fraction,
            ),
        ]
        counters: list[tuple[str, str, float]] = [
            ("prompt_tokens", "Prompt tokens of all requests.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("num_preemptions", "Sequences put back to waiting because pages ran out.", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_cache_queries),
            ("prefix_cache_hits", "Prompt tokens found there.", stats.prefix_cache_hits),
        ]
        for name, text, value in gauges:
            if value is not None:
                gauge = GaugeMetricFamily(f"jaxinfer:{name}", text, labels=list(self.labels))
                gauge.add_metric(list(self.labels.values()), value)
                yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(f"jaxinfer:{name}", text, labels=list(self.labels))
            counter.add_metric(list(self.labels.values()), value)
            yield counter
