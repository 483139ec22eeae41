"""What each number means: the one page of definitions. report.html ends with it, and README has the same words."""

from medusa_ray.report.comparable import (
    MAX_CLIENT_SHARE,
    MAX_ERROR_DIFFERENCE,
    MAX_OVERLAP,
    MAX_TOKENS_DIFFERENCE,
    MIN_BASELINE_RATE,
)
from medusa_ray.report.samples import MIN_PROMPTS, NUM_RESAMPLES
from medusa_ray.report.verdict import MAX_TTFT_RATIO, MIN_SPEEDUP

DEFINITIONS = {
    "Acceleration": (
        "Tokens per step as the server counts them: (steps + accepted guesses) / steps, over all good requests. It "
        "counts steps, not seconds. A published Medusa benchmark (Llama 3.1 8B, text-to-SQL, TGI) had an "
        "acceleration of (17,687 + 27,101) / 27,101 = 1.65, while its wall clock went from 15.56 to 18.53 tokens/s "
        "for one request at a time, which is 1.19x, and from 79.66 to 84.42 tokens/s under full load, which is 1.06x."
    ),
    "Acceleration at the client": (
        "(tokens - 1) / (stream events - 1), summed over all streamed requests: the first event brings the first "
        "token, and each after it what one step committed. It is near the server's where a server sends one event "
        "per step."
    ),
    "Time per output token": (
        "TPOT = (last content - first content) / (output tokens - 1) of each request; the headline figure. A reply "
        "of one token has none. Where a server does not tell when its last content came, the last byte stands in."
    ),
    "Gap between events": (
        "(last content - first content) / (stream events - 1) of each request: how smoothly text appears. It is the "
        "mean gap of a request, since GuideLLM keeps no single gaps; under Medusa an event holds several tokens, so "
        "gaps are longer than the time per token."
    ),
    "Inter token latency": (
        "GuideLLM's mean, as in its table: sum of (last content - first content) over sum of (output tokens - 1), so "
        "long replies weigh more than in the TPOT."
    ),
    "Time to first token": "From when a request was due to its first content.",
    "Request latency": (
        "From when a request was due to its last byte. A request is due when it is sent, but under an open load "
        "(constant, poisson) when the schedule says, so that waiting at the sender counts."
    ),
    "Percentiles": (
        "A figure without one is the median over the good requests of all rounds; p95 and p99 are over the same."
    ),
    "Rates": (
        "Requests and output tokens per second: those of completed requests over the wall window of a round, first "
        "send to last byte; the median over rounds. Of one user: output tokens over the latency of a request, the "
        "median."
    ),
    "Requests": "Sent after warm-up, failures included. A failed request counts as a failure and in no time.",
    "Goodput": (
        "Requests per second that met every limit of the SLO; a failed request meets none. The share has Wilson's "
        "95% interval, and an SLO is attained when the whole interval lies at or above the share that it asks for."
    ),
    "Intervals": (
        f"Of 95%, from {NUM_RESAMPLES:,} seeded resamples in which prompts are drawn, and rounds apart from them, "
        f"with the same draws for both arms; none where fewer than {MIN_PROMPTS} prompts have the figure. The "
        "interval of a rate is that of output tokens (or requests) over latency, scaled to the rate: with so many "
        "requests always in flight the two are proportional. The rate of an open load is given, and has none."
    ),
    "Speedup at equal concurrency": (
        "Wall clock, baseline over medusa at the same load, so more is better. Of the time per output token: ratio "
        "of the medians over all (round, prompt) pairs that both arms answered. Of output tokens per second: "
        "medusa's rate over the baseline's."
    ),
    "Speedup at equal latency": (
        "At the median latency (per token, and per request) that the baseline had at a load: the output tokens per "
        "second that medusa reaches at the same latency over the baseline's. Medusa's is the highest on the lines "
        "between neighbouring concurrencies; it is out of range where no such line comes by that latency."
    ),
    "Break-even concurrency": (
        "Where the speedup first falls below 1, on a line over the logarithm of the concurrency between measured "
        "loads; '> N' where it stays above up to the highest measured, N."
    ),
    "Predicted speedup": (
        "Acceleration over the step cost ratio, which is the measured time of a step with the tree over that of one "
        "without a tree, at as many rows. For served loads the rows are the concurrency and the tree has the mean "
        "number of nodes that was verified per step, between the sizes that the server measured. The gap, measured "
        "over predicted less one, is what a step spends beside the model, and waiting."
    ),
    "Acceptance by position": (
        "Share of steps that accepted at least that many guesses; and conditional, of the steps that accepted the "
        "guess before. A head alone is scored on held-out replies, whatever the heads before it guessed. The "
        "histogram counts steps that accepted exactly so many."
    ),
    "In and out of domain": (
        "Tokens per step on held-out prompts of the training domain, and on prompts unlike anything in training. "
        "Prompts that shaped the tree are not among those that score it."
    ),
    "Parity": (
        "Offline: prompts with the same greedy output, token for token, from medusa, baseline and transformers; "
        "where the base's two best scores are nearer than 1e-4 either may come out, and such near ties are excused. "
        "As served: prompts on which each pair of greedy texts (load, round) is the same. A prompt on which the "
        "baseline's own text changes is excused, and as large a share as the near ties had offline."
    ),
    "Exact match": (
        "Share of the base's greedy answers that equal the reference text; where answers can be executed, also the "
        "share whose result equals the reference's. Heads change neither."
    ),
    "Not comparable": (
        "A load has no speedup, but the reason in its place, where the arms did not get the same prompts, their "
        f"error rates are more than {MAX_ERROR_DIFFERENCE:.1%} apart, their greedy token totals differ by more than "
        f"{MAX_TOKENS_DIFFERENCE:.0%} or their greedy texts differ; where the client used {MAX_CLIENT_SHARE:.0%} of "
        f"a CPU core or more; where the baseline makes less than {MIN_BASELINE_RATE:.0%} of the output tokens per "
        "second of the engine of another make that the traffic names; and at all loads where the number of replicas "
        f"changed, prompts begin with two BOS tokens, or more than {MAX_OVERLAP:.0%} of them are in the training "
        "data. Prompts that are only much like training data are a caveat."
    ),
    "Verdict": (
        "Ship up to the highest concurrency such that it and all lower ones are comparable and have a lower bound of "
        f"the speedup above {MIN_SPEEDUP:.2f}, a time to first token at most {MAX_TTFT_RATIO - 1:.0%} longer or "
        "within noise, and a p99 of the time per output token that is not worse beyond noise; and parity on every "
        "prompt."
    ),
}
