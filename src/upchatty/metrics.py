"""What `/metrics` shows. Labels are few and bounded: never a chatbot, a key or a caller.

What every completion counts are plain numbers, which the client library's locks and labels would make
twenty times as costly; it reads them when somebody asks. One event loop counts, so nothing is lost.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
COUNTED = {
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts"),
    "cached_tokens": ("cached_prompt_tokens", "Tokens of prompts found in the cache"),
    "completion_tokens": ("completion_tokens", "Tokens generated"),
    "cancelled": ("completions_cancelled", "Completions whose caller went away"),
}
OBSERVED = {
    "first_token": ("time_to_first_token", "From the request to its first token"),
    "between_tokens": ("time_between_tokens", "Between two pieces of an answer, if they came apart"),
    "queue": ("queue", "Waiting for a slot"),
    "duration": ("completion", "From the request to its last token"),
}
TALLIED = {
    "completions": ("completions", "Completions by how they ended", "finish_reason"),
    "retries": ("retries", "Requests that another replica was asked, after one had failed", "reason"),
    "fallbacks": ("fallbacks", "Completions by a fallback model", "fallback"),
}


class Histogram:
    """Observations by size.

    Args:
        bounds: The buckets' upper bounds, ascending.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        """The buckets as Prometheus has them: each bound, and how many values are not above it."""
        bounds = [*map(float, self._bounds), float("inf")]
        names = ["+Inf" if bound == float("inf") else str(bound) for bound in bounds]
        return list(zip(names, accumulate(map(float, self._counts)), strict=True))


class ModelMetrics:
    """What is counted for one model."""

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0
        self.cancelled = 0
        self.first_token = Histogram(SECONDS)
        self.between_tokens = Histogram(TOKEN_SECONDS)
        self.queue = Histogram(SECONDS)
        self.duration = Histogram(SECONDS)
        self.completions: Tally[str] = Tally()
        """By finish reason."""
        self.retries: Tally[str] = Tally()
        """By why the first replica did not answer."""
        self.fallbacks: Tally[str] = Tally()
        """By the model that answered instead."""


class Metrics:
    """One server's metrics, in a registry of their own so that several servers fit one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._models: dict[str, ModelMetrics] = {}
        self.requests: Tally[int] = Tally()
        """By their answer's status."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"upchatty_{name}", text, labels, registry=self._registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"upchatty_{name}", text, labels, registry=self._registry)

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
        self.unanswered = counter("unanswered", "Questions to which documents had no answer")
        self.search = Histogram(TOKEN_SECONDS)
        """Seconds of a search in a chatbot's documents, for an answer."""
        self.rate_limited = counter("rate_limited", "Requests refused by a limit", "limit")
        self.records_lost = counter(
            "records_lost", "Records dropped because the database could not take them"
        )

    def of(self, model: str) -> ModelMetrics:
        """The metrics of one model.

        Args:
            model: Its name in the settings.
        """
        return self._models.setdefault(model, ModelMetrics())

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The plain numbers as the client library wants them; it calls this."""
        statuses = ((str(status), count) for status, count in self.requests.items())
        yield _counters("http_requests", "Requests by their answer's status", ["status"], statuses)
        searches = HistogramMetricFamily("upchatty_search_seconds", "Searching documents for an answer")
        searches.add_metric([], self.search.buckets(), self.search.sum)
        yield searches
        models = self._models.items()
        for attribute, (name, text) in COUNTED.items():
            yield _counters(name, text, ["model"], ((m, getattr(of, attribute)) for m, of in models))
        for attribute, (name, text, label) in TALLIED.items():
            tallies = [(m, k, n) for m, of in models for k, n in getattr(of, attribute).items()]
            yield _counters(name, text, ["model", label], tallies)
        for attribute, (name, text) in OBSERVED.items():
            family = HistogramMetricFamily(f"upchatty_{name}_seconds", text, labels=["model"])
            for model, of in models:
                histogram: Histogram = getattr(of, attribute)
                family.add_metric([model], histogram.buckets(), histogram.sum)
            yield family


def _counters(
    name: str, text: str, labels: list[str], values: Iterable[tuple[*tuple[str, ...], int]]
) -> Metric:
    """A family of counters: the labels of each, and its count."""
    family = CounterMetricFamily(f"upchatty_{name}", text, labels=labels)
    for *of, count in values:
        family.add_metric([str(label) for label in of], float(count))
    return family
