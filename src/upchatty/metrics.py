"""What `/metrics` shows. Labels are few and bounded: never a chatbot, a key or a caller."""

from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One server's metrics, in a registry of their own so that several servers fit one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"upchatty_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
            return Histogram(
                f"upchatty_{name}_seconds", text, ["model"], registry=self._registry, buckets=buckets
            )

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"upchatty_{name}", text, labels, registry=self._registry)

        self.requests = counter("http_requests", "Requests by their answer's status", "status")
        self.completions = counter("completions", "Completions by how they ended", "model", "finish_reason")
        self.cancelled = counter("completions_cancelled", "Completions whose caller went away", "model")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts found in the cache", "model")
        self.completion_tokens = counter("completion_tokens", "Tokens generated", "model")
        self.first_token = histogram("time_to_first_token", "From the request to its first token")
        self.between_tokens = histogram(
            "time_between_tokens",
            "Between two pieces of an answer, of those that came together once",
            TOKEN_SECONDS,
        )
        self.queue = histogram("queue", "Waiting for a slot")
        self.duration = histogram("completion", "From the request to its last token")
        self.retries = counter(
            "retries", "Requests that another replica was asked, after one had failed", "model", "reason"
        )
        self.fallbacks = counter("fallbacks", "Completions by a fallback model", "model", "fallback")
        self.running = gauge("completions_running", "Answers being generated", "model")
        self.waiting = gauge("completions_waiting", "Requests waiting for a slot", "model")
        self.replica_running = gauge(
            "replica_running", "Answers being generated, by replica", "model", "replica"
        )
        self.replica_open = gauge(
            "replica_open", "1 where a replica is set aside after failures", "model", "replica"
        )
        self.loaded = gauge("model_loaded", "1 where a local model is in memory", "model")
        self.engine_restarts = gauge("engine_restarts", "Restarts after a crash", "model")
        self.rate_limited = counter("rate_limited", "Requests refused by a limit", "limit")
        self.records_lost = counter(
            "records_lost", "Records dropped because the database could not take them"
        )

        self._models: dict[str, ModelMetrics] = {}

    def of(self, model: str) -> "ModelMetrics":
        """The metrics of one model.

        Args:
            model: Its name in the settings.
        """
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model)
        return self._models[model]

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)


class ModelMetrics:
    """One model's metrics, looked up once: a label costs more than a count.

    Args:
        metrics: All of them.
        model: The model's name in the settings.
    """

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.cancelled = metrics.cancelled.labels(model)
        self.prompt_tokens = metrics.prompt_tokens.labels(model)
        self.cached_tokens = metrics.cached_tokens.labels(model)
        self.completion_tokens = metrics.completion_tokens.labels(model)
        self.first_token = metrics.first_token.labels(model)
        self.between_tokens = metrics.between_tokens.labels(model)
        self.queue = metrics.queue.labels(model)
        self.duration = metrics.duration.labels(model)
        self.completions = cache(partial(metrics.completions.labels, model))
        """By finish reason."""
        self.retries = cache(partial(metrics.retries.labels, model))
        """By reason."""
        self.fallbacks = cache(partial(metrics.fallbacks.labels, model))
        """By the model that answered instead."""
