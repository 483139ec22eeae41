"""What one server has done -> Prometheus metrics, under vLLM's names and TGI's behind `medusa_ray_`."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from medusa_ray.serve.calls import Histogram
from medusa_ray.serve.server import Server

PREFIX = "medusa_ray_"


class Metrics:
    """A collector, as prometheus_client's registries take them."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._labels = {"model_name": server.args.model_id}
        if server.replica:
            self._labels["replica"] = server.replica

    def collect(self) -> Iterator[Metric]:
        """The metrics of this replica."""
        yield from self._counters()
        yield from self._gauges()
        yield from self._histograms()
        totals = self._server.totals
        skipped = SummaryMetricFamily(
            f"{PREFIX}request_skipped_tokens",
            "Tokens of a step beyond its first; (sum + count) / count is tokens per step, prefills included.",
            labels=[*self._labels],
        )
        skipped.add_metric([*self._labels.values()], totals.num_iterations, totals.num_skipped_tokens)
        yield skipped

    def _counters(self) -> Iterator[Metric]:
        server, scheduler = self._server, self._server.engine.scheduler
        engine, totals = server.engine.counters, server.totals
        counter = self._counter
        yield counter("prompt_tokens", "Prompt tokens processed.", engine.num_prompt_tokens)
        yield counter("generation_tokens", "Tokens generated.", engine.num_generated_tokens)
        yield counter("prefix_cache_queries", "Tokens of prompts.", scheduler.num_queried_tokens)
        yield counter("prefix_cache_hits", "Those in the cache already.", scheduler.num_shared_tokens)
        yield counter("spec_decode_num_drafts", "Steps with guesses.", engine.num_drafts)
        yield counter("spec_decode_num_draft_tokens", "Guesses.", engine.num_draft_tokens)
        yield counter("spec_decode_num_accepted_tokens", "Right guesses.", engine.num_accepted_tokens)
        at_place = {str(i): n for i, n in enumerate(engine.num_accepted_tokens_per_pos)}
        yield counter(
            "spec_decode_num_accepted_tokens_per_pos", "Right guesses by place.", at_place, "position"
        )
        yield counter("request_count", "Requests for replies.", totals.num_requests)
        yield counter("request_success", "Replies that are whole.", totals.finished, "finished_reason")
        yield counter(
            "request_failure", "Requests that failed, by TGI's words for why.", totals.failed, "err"
        )
        if traffic := server.traffic:
            yield counter("traffic_logged", "Chats in the log's files.", traffic.num_logged)
            yield counter("traffic_dropped", "Sampled chats that are in none.", traffic.num_dropped, "reason")
            yield counter("traffic_failed_writes", "Attempts to write a file.", traffic.num_failed_writes)

    def _gauges(self) -> Iterator[Metric]:
        engine, gauge = self._server.engine, self._gauge
        for name in ("num_requests_running", "batch_current_size"):
            yield gauge(name, "Requests that have a row of the batch.", engine.num_running)
        for name in ("num_requests_waiting", "queue_size"):
            yield gauge(name, "Requests that have none yet.", engine.num_waiting)
        yield gauge("kv_cache_usage_perc", "Share of the cache that is held, 0 to 1.", engine.cache.usage)
        sizer = engine.sizer if engine.is_adaptive else None
        yield gauge("tree_nodes", "Guesses of a step now.", sizer.size - 1 if sizer else engine.num_nodes)
        yield gauge("tree_nodes_max", "Guesses of the whole tree.", engine.num_nodes)
        if sizer:
            yield gauge(
                "tree_expected_tokens", "Tokens that a step is expected to commit.", sizer.tokens(sizer.size)
            )
        yield gauge(
            "heads_refused", "1 where those asked for last are not served.", bool(self._server.refusal)
        )
        # Those of before too, as 0: Ray goes on telling the last value of whatever it was told of once.
        info = GaugeMetricFamily(
            f"{PREFIX}heads_info",
            "1, for the heads that are served.",
            labels=[*self._labels, "heads", "version"],
        )
        now = self._server.served[-1]
        for served in self._server.served:
            heads = served.heads or "none", served.version
            if served is now or heads != (now.heads or "none", now.version):
                info.add_metric([*self._labels.values(), *heads], served is now)
        yield info

    def _histograms(self) -> Iterator[Metric]:
        """Under both names where both servers have one."""
        totals = self._server.totals
        for histogram, help, *names in (
            (totals.ttft_s, "To the first token, seconds.", "time_to_first_token_seconds"),
            (totals.inter_token_s, "From token to token, seconds.", "inter_token_latency_seconds"),
            (
                totals.mean_token_s,
                "From token to token, a request's mean, seconds.",
                "request_time_per_output_token_seconds",
                "request_mean_time_per_token_duration",
            ),
            (totals.request_s, "Of a whole request, s.", "e2e_request_latency_seconds", "request_duration"),
            (totals.queue_s, "Waiting, s.", "request_queue_time_seconds", "request_queue_duration"),
            (
                totals.inference_s,
                "Of prefill and decoding, s.",
                "request_inference_time_seconds",
                "request_inference_duration",
            ),
            (totals.validation_s, "Of reading and checking a request, s.", "request_validation_duration"),
            (
                totals.num_prompt_tokens,
                "Tokens of a prompt.",
                "request_prompt_tokens",
                "request_input_length",
            ),
            (
                totals.num_tokens,
                "Tokens of a reply.",
                "request_generation_tokens",
                "request_generated_tokens",
            ),
            (
                totals.max_new_tokens,
                "Tokens that a reply may have.",
                "request_params_max_tokens",
                "request_max_new_tokens",
            ),
        ):
            for name in names:
                yield self._histogram(name, help, histogram)

    def _counter(self, name: str, help: str, value: float | Mapping[str, float], *labels: str) -> Metric:
        family = CounterMetricFamily(PREFIX + name, help, labels=[*self._labels, *labels])
        values = [([], value)] if isinstance(value, int | float) else [([k], v) for k, v in value.items()]
        for more, number in values:
            family.add_metric([*self._labels.values(), *more], number)
        return family

    def _gauge(self, name: str, help: str, value: float, more: Mapping[str, str] | None = None) -> Metric:
        labels = {**self._labels, **(more or {})}
        family = GaugeMetricFamily(PREFIX + name, help, labels=[*labels])
        family.add_metric([*labels.values()], value)
        return family

    def _histogram(self, name: str, help: str, histogram: Histogram) -> Metric:
        bounds: list[Any] = [*map(str, histogram.bounds), "+Inf"]
        buckets = list(zip(bounds, accumulate(histogram.counts), strict=True))
        family = HistogramMetricFamily(PREFIX + name, help, labels=[*self._labels])
        family.add_metric([*self._labels.values()], buckets, histogram.sum)
        return family
