"""What `/metrics` shows. Labels are few and bounded: never a chatbot, a key or a caller."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One server's metrics, in a registry of their own so that several servers fit one process."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"upchatty_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(
                f"upchatty_{name}_seconds", text, labels, registry=self._registry, buckets=SECONDS
            )

        self.requests = counter("http_requests", "Requests by their answer's status", "status")
        self.completions = counter("completions", "Completions by how they ended", "model", "finish_reason")
        self.cancelled = counter("completions_cancelled", "Completions whose caller went away", "model")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", "model")
        self.cached_tokens = counter("cached_prompt_tokens", "Tokens of prompts found in the cache", "model")
        self.completion_tokens = counter("completion_tokens", "Tokens generated", "model")
        self.first_token = histogram("time_to_first_token", "From the request to its first token", "model")
        self.queue = histogram("queue", "Waiting for a slot", "model")
        self.duration = histogram("completion", "From the request to its last token", "model")
        self.running = Gauge(
            "upchatty_completions_running", "Answers being generated", ["model"], registry=self._registry
        )
        self.waiting = Gauge(
            "upchatty_completions_waiting", "Requests waiting for a slot", ["model"], registry=self._registry
        )
        self.engine_restarts = Gauge(
            "upchatty_engine_restarts", "Restarts after a crash", ["model"], registry=self._registry
        )
        self.records_lost = counter(
            "records_lost", "Records dropped because the database could not take them"
        )

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self._registry)
