"""`Metrics`: what a server counts, for Prometheus, under vLLM's names."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from depthprune_runtime.engine.outputs import EngineStats, OutputDelta

_LABELS = ("model_name", "engine")
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Clock:
    """Times of one request, from its arrival on."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._arrival = time.monotonic()
        self._last: dict[int, float] = {}  # by output

    def saw(self, delta: OutputDelta) -> None:
        """Count the news of one output."""
        now = time.monotonic()
        if delta.token_ids:
            last = self._last.get(delta.output_index)
            if last is None:
                self._metrics.first_token.observe(now - self._arrival)
            else:  # tokens of a burst share its time
                for _ in delta.token_ids:
                    self._metrics.inter_token.observe((now - last) / len(delta.token_ids))
            self._last[delta.output_index] = now
        if delta.finish_reason is not None:
            self._metrics.ended(delta.finish_reason)
        if delta.result is not None:
            self._metrics.end_to_end.observe(now - self._arrival)
            self._metrics.request_prompt.observe(len(delta.result.prompt_token_ids))
            for output in delta.result.outputs:
                self._metrics.request_generation.observe(len(output.token_ids))


class Metrics:
    """Counters of requests, and the engine's own totals as they are when somebody asks."""

    def __init__(self, model: str) -> None:
        self._values = (model, "0")
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._stats: EngineStats | None = None
        self._success = Counter(
            "vllm:request_success", "Outputs that ended.", (*_LABELS, "finished_reason"), registry=self._registry
        )
        self.first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two tokens.", _SECONDS)
        self.end_to_end = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", _SECONDS)
        self.request_prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.request_generation = self._histogram("request_generation_tokens", "Tokens of an output.", _TOKENS)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        made = Histogram(f"vllm:{name}", what, _LABELS, buckets=buckets, registry=self._registry)
        return made.labels(*self._values)

    def clock(self) -> Clock:
        """For a request that has just come."""
        return Clock(self)

    def ended(self, reason: str) -> None:
        self._success.labels(*self._values, reason).inc()

    def collect(self) -> Iterable[Metric]:
        """The engine's totals; called by the registry."""
        stats = self._stats
        if stats is None:
            return
        gauges = {
            "num_requests_running": ("Outputs that run.", stats.num_running),
            "num_requests_waiting": ("Outputs that wait.", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of the KV cache in use, 0 to 1.", stats.kv_usage),
        }
        counters = {
            "prefix_cache_queries": ("Prompt tokens that were looked up in the KV cache.", stats.num_prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens that were found there.", stats.num_cached_tokens),
            "prompt_tokens": ("Tokens of prompts.", stats.num_prompt_tokens),
            "generation_tokens": ("Tokens that were generated.", stats.num_output_tokens),
            "num_preemptions": ("Outputs that had to wait again.", stats.num_preemptions),
        }
        for kind, families in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (what, value) in families.items():
                family = kind(f"vllm:{name}", what, labels=_LABELS)
                family.add_metric(self._values, value)
                yield family

    def render(self, stats: EngineStats | None) -> bytes:
        """All of it as text.

        Args:
            stats: of the engine, None once it has stopped.

        Returns:
            The text that Prometheus reads.
        """
        self._stats = stats
        return generate_latest(self._registry)
