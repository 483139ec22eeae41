"""What stages hand each other: the columns of every table and the keys of every JSON file.

    chats --data--> prompts/ --distill--> distilled/ --hidden--> hidden/ --train--> heads/
        --evaluate--> heads/tree.json, heads/accuracy.json, evaluation/ --bench--> bench/ --report--> report/

These are the only things that stages know of one another. Tables are Parquet; token ids are int32 lists and
stay as the model made them: never turned into text and back. Positions count from 0 at the first prompt
token.
"""

from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 2  # of report.json and compare.json

TOKENS = pa.list_(pa.int32())
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

# prompts/<split>/*.parquet, split being train, test or out_of_domain: one row per turn to be answered.
PROMPTS = pa.schema(
    [
        ("id", pa.string()),  # chat/turn
        ("messages", MESSAGES),  # everything before the turn; null when the chat came as bare text
        ("prompt_ids", TOKENS),  # the rendered prompt, generation prompt included; empty on error
        ("reference", pa.string()),  # the chat's own answer, when it has one
        ("reference_ids", TOKENS),  # the same as token ids, its end-of-turn token included
        ("source", pa.string()),  # which of the split's sources the chat came from
        ("error", pa.string()),  # null when good
    ]
)

# <traffic_log.uri>/train-*.parquet: one row per chat that a server has answered; `data` reads the folder as it is.
# There are no token ids: what a redaction hook takes out of the text is to have no second copy.
TRAFFIC = pa.schema(
    [
        ("id", pa.string()),  # of the reply, as its client got it
        ("messages", MESSAGES),  # the request's, and the reply as the assistant's last
        ("model", pa.string()),  # as the request named it
        ("created", pa.int64()),  # when the request came, seconds since 1970
        ("finish_reason", pa.string()),  # stop | length | deadline
    ]
)

# distilled/*.parquet: one row per reply.
DISTILLED = pa.schema(
    [
        ("id", pa.string()),  # chat/turn/sample
        ("prompt_ids", TOKENS),
        ("reply_ids", TOKENS),  # as generated, the end-of-sequence token included when there was one
        ("finish_reason", pa.string()),  # stop | length, as OpenAI names them
        ("error", pa.string()),  # null when good
    ]
)

# hidden/*.parquet: one row per good distilled row that leaves a head a label, in their order; no parts at all where
# training streams them. Schema metadata: dtype (float32 | bfloat16), hidden_size, top_k. The sequence is prompt_ids +
# reply_ids, T tokens of which P are prompt. A head at position t guesses tokens t + 2 and later, and is only ever asked
# at t >= P - 1, so positions are P - 1 ... T - 3; where all tokens are labels (data.loss_on: all), 0 ... T - 3.
# teacher_*: what the base itself finds likely for each token that may be a label, in their order, row-major
# [labels, top_k]; what it says for token t is in state t - 1. Empty where top_k is 0.
HIDDEN = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", TOKENS),
        ("position", TOKENS),
        ("hidden", pa.large_binary()),  # row-major [len(position), hidden_size] in the base's dtype
        ("label_mask", pa.list_(pa.bool_())),  # per token of input_ids: may it be a label?
        ("teacher_ids", TOKENS),  # likeliest first
        ("teacher_logprobs", pa.list_(pa.float32())),
    ]
)

# evaluation/replies.parquet: the base's greedy reply to every held-out prompt of split test.
REPLIES = pa.schema([("id", pa.string()), ("reply", pa.string()), ("reference", pa.string())])

# evaluation/sweep.parquet: one row per tree, acceptance, temperature and split.
SWEEP = pa.schema(
    [
        ("tree", pa.string()),  # as evaluate.sweep.trees names it
        ("nodes", pa.int32()),  # guesses of a step
        ("layout", pa.string()),  # of the heads
        ("acceptance", pa.string()),  # exact, or typical with epsilon and alpha
        ("temperature", pa.float64()),
        ("split", pa.string()),
        ("prompts", pa.int32()),
        ("tokens_per_step", pa.float64()),
        ("low", pa.float64()),  # its 95% interval, a bootstrap over prompts; null of fewer than five
        ("high", pa.float64()),
        ("steps", pa.int64()),
        ("seconds", pa.float64()),  # of the engine; null where the figure follows from ranks
    ]
)

# bench/requests.parquet: one row per request sent, warm-up left out, failures included.
REQUESTS = pa.schema(
    [
        ("arm", pa.string()),  # target's name
        ("load", pa.string()),  # synchronous | concurrency=N | throughput | poisson=R | constant=R
        ("round", pa.int32()),
        ("prompt", pa.int32()),  # index of the prompt in the traffic
        ("start_s", pa.float64()),  # seconds since the epoch
        ("latency_s", pa.float64()),  # send to last byte
        ("ttft_s", pa.float64()),  # send to first content
        ("prompt_tokens", pa.int32()),
        ("output_tokens", pa.int32()),
        ("num_steps", pa.int32()),  # engine steps after prefill; null where a server does not tell
        (
            "accepted_histogram",
            pa.list_(pa.int32()),
        ),  # [j]: steps that accepted exactly j guesses; null likewise
        ("text", pa.string()),
        ("error", pa.string()),  # null when good
        ("events", pa.int32()),  # of the stream, with content; null where nothing was streamed
        ("last_s", pa.float64()),  # send to last content; null likewise
        # When it was due to when it was sent, in an open load; null in a closed one, where it is due when it is sent.
        ("wait_s", pa.float64()),
        ("draft_tokens", pa.int32()),  # guesses verified for it; null where a server does not tell
        ("category", pa.string()),  # what kind of prompt it is, a prompt row's `source`; null where unknown
    ]
)

# heads/training.jsonl, one line for each logged step:
#   {"step": n, "of": n, "epoch": x, "learning_rate": x, "loss": x, "head_loss": [...], "top1": [...], "top5": [...],
#    "positions_per_s": x, "memory_gib": x, "share_of_peak": x,
#    "held_out": {"loss": x, "head_loss": [...], "top1": [...], "top5": [...],        # where the heads were judged
#                 "tokens_per_step": {"chain": x, "tree_N": x}}}
# and after joint training, here and under held_out, "base_kl": x from the base as it was, and "base_top1": x of next
# tokens. Its positions are tokens that pass through the base. What came before it is in warm_heads/training.jsonl.
# heads/tree.json, best nodes first, so that a prefix of the paths is itself the best smaller tree:
#   {"paths": [[0], [0, 0], ...], "nodes": n, "calibrated_on": num_prompts}
# heads/accuracy.json, of held-out prompts that did not shape the tree; acceptance in tokens per step,
# accepted_per_position the share of steps that accepted guess k, from 0:
#   {"heads": {"top1": [...], "top5": [...]},
#    "acceptance": {"chain": x, "calibrated_N": x, "out_of_domain_chain": x},
#    "accepted_per_position": {"chain": [...], "out_of_domain_chain": [...]},
#    "prompts": {"scored": n, "out_of_domain": n}}
# heads/card.json, what the run's config says for the model card and no stage can know: see config.CardConfig.
# heads/README.md, the model card: from all of these, see card.py.
# evaluation/evaluation.json; near_ties are excused differences, engine is null when nothing was timed:
#   {"prompts": n, "quality": {"exact_match": x}, "hardware": {}, "model": {"dtype": x, "num_parameters": n},
#    "parity": {"prompts": n, "token_exact": n, "near_ties": n},
#    "engine": {ARM: {"tokens_per_s": x, "ms_per_step": x}, "speedup": r, "mode": "eager", "threads": n,
#               "by_batch": {BATCH: {"baseline": tokens/s, "medusa": tokens/s, "acceleration": x, "step_cost_ratio": x,
#                                    "predicted": acceleration / step_cost_ratio, "measured": x}}}}
# evaluation/sweep.parquet and sweep.{png,svg}, only where evaluate.sweep asks: SWEEP
# evaluation/quality.json, only where something can run the answers:
#   {"execution_accuracy": x, ...}
# bench/bench.json; client is the share of a CPU core that GuideLLM's busiest process took, a value a round; what a
# target does not tell is null; serve_paths only where several paths were measured:
#   {"hardware": {...}, "versions": {...}, "traffic": {...},
#    "arms": {ARM: {"info": {...}, "guidellm": {LOAD: [{...}]}, "replicas": [n at the start, n at the end],
#                   "autoscales": bool}},
#    "client": {ARM: {LOAD: [x, ...]}}, "not_comparable": [LOAD, ...],
#    "checks": {"double_bos": n, "overlap": {"checked": bool, "exact": n, "near": n, "of": n}},
#    "ramp": {"arm": ARM, "steps": [[second, concurrency], ...], "replicas": [[second, running, wanted], ...],
#             "latency": [[second, p50_s, p99_s], ...], "failed": n},
#    "serve_paths": {PATH: {FIGURE: x}}}
# report/report.json: see report/schema.py, and report.schema.json beside it


def first_position(num_prompt: int, loss_on: str) -> int:
    """Where a head is asked for the first time; one place before the first token that may be a label."""
    return 0 if loss_on == "all" else num_prompt - 1


def num_positions(num_prompt: int, num_reply: int, loss_on: str) -> int:
    """Positions of a row of HIDDEN; a row without any is left out.

    One fewer than tokens that may be labels: the state that produced the last token has nothing left to guess.
    """
    return max(0, num_prompt + num_reply - 2 - first_position(num_prompt, loss_on))


def hidden_row(
    row_id: str,
    prompt_ids: list[int],
    reply_ids: list[int],
    hidden: bytes,
    loss_on: str = "last",
    teacher_ids: list[int] | None = None,
    teacher_logprobs: list[float] | None = None,
) -> dict[str, Any]:
    """A row of HIDDEN. `hidden` holds the states at its positions, teacher_* are flat already."""
    first, num_tokens = first_position(len(prompt_ids), loss_on), len(prompt_ids) + len(reply_ids)
    return {
        "id": row_id,
        "input_ids": prompt_ids + reply_ids,
        "position": list(range(first, num_tokens - 2)),
        "hidden": hidden,
        "label_mask": [False] * (first + 1) + [True] * (num_tokens - first - 1),
        "teacher_ids": teacher_ids or [],
        "teacher_logprobs": teacher_logprobs or [],
    }


def hidden_table(rows: list[dict[str, Any]], dtype: str, hidden_size: int, top_k: int = 0) -> pa.Table:
    """Rows of `hidden_row` as a table of HIDDEN, with its schema metadata."""
    metadata = {"dtype": dtype, "hidden_size": str(hidden_size), "top_k": str(top_k)}
    return pa.Table.from_pylist(rows, HIDDEN.with_metadata(metadata))


def check_columns(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table cast to `schema`, its columns in order. Raises ValueError that lists missing columns."""
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise ValueError(
            f"{where} lacks the columns {missing}; it has {table.column_names}. It was not written by the "
            "stage before this one: run that stage again."
        )
    return table.select(schema.names).cast(schema)
