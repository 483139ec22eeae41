"""What one server has done -> Prometheus metrics, under vLLM's names and TGI's behind `medusa_ray_`."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from medusa_ray.serve.server import Server


class Metrics:
    """A collector, as prometheus_client's registries take them."""

    def __init__(self, server: Server) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        """The metrics of this replica."""
        server, engine = self._server, self._server.engine
        totals, label = engine.counters, [server.args.model_id]

        def counter(name: str, help: str, values: Mapping[Any, float], *labels: str) -> Metric:
            family = CounterMetricFamily(f"medusa_ray_{name}", help, labels=["model_name", *labels])
            for more, value in values.items():
                family.add_metric([*label, *more], value)
            return family

        yield counter("prompt_tokens", "Prompt tokens processed.", {(): totals.num_prompt_tokens})
        yield counter("generation_tokens", "Tokens generated.", {(): totals.num_generated_tokens})
        yield counter("spec_decode_num_drafts", "Steps with guesses.", {(): totals.num_drafts})
        yield counter("spec_decode_num_draft_tokens", "Guesses.", {(): totals.num_draft_tokens})
        yield counter("spec_decode_num_accepted_tokens", "Right guesses.", {(): totals.num_accepted_tokens})
        per_position = {(str(i),): n for i, n in enumerate(totals.num_accepted_tokens_per_pos)}
        yield counter(
            "spec_decode_num_accepted_tokens_per_pos", "Right guesses by place.", per_position, "position"
        )
        finished = {(reason,): n for reason, n in server.finished.items()}
        yield counter("request_success", "Requests answered to their end.", finished, "finished_reason")
        skipped = SummaryMetricFamily(
            "medusa_ray_request_skipped_tokens",
            "Tokens of a step beyond its first; (sum + count) / count is tokens per step, prefills included.",
            labels=["model_name"],
        )
        skipped.add_metric(label, server.num_iterations, server.num_skipped_tokens)
        yield skipped
        for name, value in (
            ("running", engine.num_running),
            ("waiting", engine.num_waiting),
        ):
            name = f"medusa_ray_num_requests_{name}"
            gauge = GaugeMetricFamily(name, "Requests now.", labels=["model_name"])
            gauge.add_metric(label, value)
            yield gauge
        if server.traffic:
            dropped = {(reason,): n for reason, n in server.traffic.num_dropped.items()}
            yield counter("traffic_logged", "Chats in the log's files.", {(): server.traffic.num_logged})
            yield counter("traffic_dropped", "Sampled chats that are in none.", dropped, "reason")
            yield counter(
                "traffic_failed_writes",
                "Attempts to write a file.",
                {(): server.traffic.num_failed_writes},
            )
