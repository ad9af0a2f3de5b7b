"""Prometheus metrics of the server, under the names that vLLM dashboards know.

The names in `vllm:…` and their units are vLLM's; the names in `cqil:…` are our own. Every series has the label
`model_name`. Times are seconds, the cache usage is 0 to 1, prefix cache counts are tokens.

NaN, infinite and negative values are dropped: a metric never raises in the path of a request. A reason that is not
listed is counted as "other".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FINISH_REASONS = ("stop", "length", "abort", "error")
REFUSE_REASONS = ("queue_full", "draining", "too_large", "too_slow", "invalid", "unauthorized", "timeout")
OTHER_REASON = "other"

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Time of one token or one step: 0.25 ms wide around 1 ms.
# fmt: off
STEP_BUCKETS = (
    0.00025, 0.0005, 0.00075, 0.001, 0.00125, 0.0015, 0.002, 0.0025, 0.003, 0.004, 0.005, 0.0075, 0.01,
    0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
)
# Time of a request or a part of it: up to 10 minutes, since a long answer takes more than 10 s.
REQUEST_BUCKETS = (
    0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1,
    0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0,
)
# fmt: on
ITERATION_BUCKETS = tuple(float(2**power) for power in range(15))

_INF = math.inf


def token_buckets(max_model_len: int) -> tuple[float, ...]:
    """Return 1, 2, 5, 10, 20, 50, … up to `max_model_len`, and at least 1."""
    buckets = [1.0]
    while True:
        for factor in (2.0, 2.5, 2.0):
            bound = buckets[-1] * factor
            if bound > max_model_len:
                return tuple(buckets)
            buckets.append(bound)


def _observe(histogram: Histogram, value: float) -> None:
    if 0.0 <= value < _INF:
        histogram.observe(value)


def _add(counter: Counter, amount: float) -> None:
    if 0.0 <= amount < _INF:
        counter.inc(amount)


def _set(gauge: Gauge, value: float) -> None:
    if 0.0 <= value < _INF:
        gauge.set(value)


class Metrics:
    """The metrics of one served model, in a registry of their own.

    Safe to call from several threads. All series but those of `rank_seen` and of unlisted reasons exist from the
    start, at 0, so that a rate sees the first event.
    """

    def __init__(
        self, model_name: str, max_model_len: int = 131072, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Create all series. `max_model_len` bounds the buckets of token counts; `clock` is there for tests."""
        self.model_name = model_name
        self.registry = CollectorRegistry()
        self._clock = clock
        self._rank_seen_at: dict[int, float] = {}

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model_name"], registry=self.registry).labels(model_name)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry).labels(model_name)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry).labels(model_name)

        def by_reason(name: str, text: str, label: str, reasons: Iterable[str]) -> tuple[Counter, dict[str, Counter]]:
            parent = Counter(name, text, ["model_name", label], registry=self.registry)
            return parent, {reason: parent.labels(model_name, reason) for reason in reasons}

        self._running = gauge("vllm:num_requests_running", "Requests being computed.")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests waiting to be computed.")
        self._cache_usage = gauge("vllm:kv_cache_usage_perc", "KV cache in use, 0 to 1.")
        self._healthy = gauge("cqil:healthy", "1 if the server is healthy, else 0.")
        self._rank_age = Gauge(
            "cqil:rank_last_seen_seconds",
            "Seconds since the rank was last seen.",
            ["model_name", "rank"],
            registry=self.registry,
        )

        self._prompt_tokens = counter("vllm:prompt_tokens_total", "Prompt tokens of the requests started.")
        self._generation_tokens = counter("vllm:generation_tokens_total", "Tokens generated.")
        self._prefix_queries = counter("vllm:prefix_cache_queries_total", "Tokens looked up in the prefix cache.")
        self._prefix_hits = counter("vllm:prefix_cache_hits_total", "Tokens found in the prefix cache.")
        self._drafts = counter("vllm:spec_decode_num_drafts_total", "Drafts, of a sequence for a step.")
        self._draft_tokens = counter("vllm:spec_decode_num_draft_tokens_total", "Tokens drafted.")
        self._accepted_tokens = counter("vllm:spec_decode_num_accepted_tokens_total", "Drafted tokens accepted.")
        self._finished, self._finished_by = by_reason(
            "vllm:request_success_total",
            "Requests finished, by reason (aborts and errors too).",
            "finished_reason",
            FINISH_REASONS,
        )
        self._refused, self._refused_by = by_reason(
            "cqil:requests_refused_total", "Requests refused before they started, by reason.", "reason", REFUSE_REASONS
        )

        self._first_token = histogram(
            "vllm:time_to_first_token_seconds", "Time from a request's arrival to its first token.", REQUEST_BUCKETS
        )
        self._inter_token = histogram(
            "vllm:inter_token_latency_seconds", "Time between two tokens of a request.", STEP_BUCKETS
        )
        self._e2e = histogram(
            "vllm:e2e_request_latency_seconds", "Time from a request's arrival to its end.", REQUEST_BUCKETS
        )
        self._queue_time = histogram("vllm:request_queue_time_seconds", "Time in the queue.", REQUEST_BUCKETS)
        self._prefill_time = histogram("vllm:request_prefill_time_seconds", "Time in prefill.", REQUEST_BUCKETS)
        self._decode_time = histogram("vllm:request_decode_time_seconds", "Time in decode.", REQUEST_BUCKETS)
        lengths = token_buckets(max_model_len)
        self._request_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens of a finished request.", lengths)
        self._request_generation = histogram(
            "vllm:request_generation_tokens", "Tokens generated by a finished request.", lengths
        )
        self._iteration_tokens = histogram("vllm:iteration_tokens_total", "Tokens per engine step.", ITERATION_BUCKETS)
        self._step = histogram("cqil:step_seconds", "Time of a decode step.", STEP_BUCKETS)

        self._inc_generation = self._generation_tokens.inc
        self._observe_inter_token = self._inter_token.observe

    # A request's life, in order.

    def refused(self, reason: str) -> None:
        """Count a request refused before it started; `reason` is one of REFUSE_REASONS."""
        counter = self._refused_by.get(reason)
        (counter or self._refused.labels(self.model_name, OTHER_REASON)).inc()

    def request_started(self, prompt_tokens: int) -> None:
        """Count the prompt tokens of a request that was accepted."""
        _add(self._prompt_tokens, prompt_tokens)

    def queued(self, seconds: float) -> None:
        """Record the time that a request spent in the queue, when it leaves it."""
        _observe(self._queue_time, seconds)

    def prefix(self, queried: int, hit: int) -> None:
        """Count a prompt's tokens looked up in the prefix cache, and those found there."""
        _add(self._prefix_queries, queried)
        _add(self._prefix_hits, hit)

    def first_token(self, seconds: float) -> None:
        """Count a request's first token and record the time from the request's arrival to it."""
        self._inc_generation()
        _observe(self._first_token, seconds)

    def token(self, interval: float) -> None:
        """Count one token after the first and record the time since the token before it."""
        self._inc_generation()
        if 0.0 <= interval < _INF:
            self._observe_inter_token(interval)

    def tokens(self, intervals: Sequence[float]) -> None:
        """Do what `token` does for each interval; cheaper than one call each."""
        self._inc_generation(len(intervals))
        observe = self._observe_inter_token
        for interval in intervals:
            if 0.0 <= interval < _INF:
                observe(interval)

    def finished(
        self,
        reason: str,
        e2e: float,
        prompt_tokens: int,
        generated: int,
        prefill_seconds: float | None = None,
        decode_seconds: float | None = None,
    ) -> None:
        """Record the end of a request that was started; `reason` is one of FINISH_REASONS.

        `e2e` is the time from arrival to end. The phase times are None for a phase that the request did not reach.
        The token counts go to the histograms only: the totals were counted as the tokens came.
        """
        counter = self._finished_by.get(reason)
        (counter or self._finished.labels(self.model_name, OTHER_REASON)).inc()
        _observe(self._e2e, e2e)
        _observe(self._request_prompt, prompt_tokens)
        _observe(self._request_generation, generated)
        if prefill_seconds is not None:
            _observe(self._prefill_time, prefill_seconds)
        if decode_seconds is not None:
            _observe(self._decode_time, decode_seconds)

    # The engine's state.

    def step(self, tokens: int, decode_seconds: float | None = None) -> None:
        """Record one engine step over `tokens` tokens, prompt and generated; its time if it was a decode step."""
        _observe(self._iteration_tokens, tokens)
        if decode_seconds is not None:
            _observe(self._step, decode_seconds)

    def drafts(self, number: int, tokens: int, accepted: int) -> None:
        """Count the drafts of a step, their tokens, and those that were accepted."""
        _add(self._drafts, number)
        _add(self._draft_tokens, tokens)
        _add(self._accepted_tokens, accepted)

    def gauges(self, running: int, waiting: int, cache_usage: float, healthy: bool) -> None:
        """Set the current number of requests running and waiting, the cache usage (0 to 1) and the health."""
        _set(self._running, running)
        _set(self._waiting, waiting)
        _set(self._cache_usage, cache_usage)
        self._healthy.set(1.0 if healthy else 0.0)

    def rank_seen(self, rank: int, seconds_ago: float = 0.0) -> None:
        """Record that `rank` was seen `seconds_ago`; the exposed age goes on growing until the next call."""
        if not 0.0 <= seconds_ago < _INF:
            return
        seen_at = self._rank_seen_at
        is_new = rank not in seen_at
        seen_at[rank] = self._clock() - seconds_ago
        if is_new:
            age = self._rank_age.labels(self.model_name, str(rank))
            age.set_function(lambda: max(0.0, self._clock() - seen_at[rank]))

    def exposition(self) -> tuple[bytes, str]:
        """Return the body and the content type of an answer to GET /metrics."""
        return generate_latest(self.registry), CONTENT_TYPE
