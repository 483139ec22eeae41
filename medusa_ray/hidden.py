"""Distilled rows -> hidden states of the frozen base, at the positions where a head will be asked.

Where distillation has captured them there is nothing left to compute. Otherwise Ray Data deals the parts of
distilled/ to actors that hold the body of the base: each becomes the part of hidden/ with the same name.

# B rows of a pass   T tokens   C hidden
"""

import functools
from collections.abc import Iterator
from typing import Any

from medusa_ray import parts, provenance, records, shards
from medusa_ray.config import RunConfig, UserError

Row = dict[str, Any]


def run(config: RunConfig) -> str:
    """Writes hidden/*.parquet and returns the URI of hidden/.

    A row with an error, or with a reply too short to leave a label, has no hidden row; both are counted.
    Raises UserError when distilled/ is not finished.
    """
    distilled, hidden = (parts.absolute(config.artifact(name)) for name in ("distilled", "hidden"))
    settings = config.model.model_dump(include={"revision", "dtype"})
    inputs = {"distilled": provenance.digest(distilled)}
    if provenance.is_complete(hidden, settings, inputs):
        return config.artifact("hidden")
    if provenance.read(distilled) is None:
        raise UserError(f"{distilled} is not finished. Run the distill stage first.")

    # Parts belong to the distilled rows that they were made from, captured or computed.
    done = parts.begin(hidden, inputs["distilled"])
    refs = [shards.put({"part": name}) for name in parts.names(distilled) if name not in done]
    device = shards.device_of(config.model)
    make_worker = functools.partial(Body, config, shards.base_of(config.model), device, distilled, hidden)
    resources = shards.actors(config.hidden.num_actors, len(refs), device)
    for _ in shards.run("hidden", refs, make_worker, **resources):
        pass
    provenance.write(hidden, settings, inputs, **_facts(distilled, hidden))
    return config.artifact("hidden")


def _facts(distilled: str, hidden: str) -> dict[str, Any]:
    names = parts.names(distilled)
    errors = [parts.read(distilled, name, ["error"])["error"] for name in names]
    failed = sum(len(column) - column.null_count for column in errors)
    num_in = sum(map(len, errors))
    good = sum(parts.num_rows(hidden, name) for name in names)
    positions = (parts.read(hidden, name, ["position"])["position"] for name in names)
    reasons = {"error in distilled": failed, "too short": num_in - failed - good}
    return {
        "rows": {"in": num_in, "good": good, "errors": {reason: n for reason, n in reasons.items() if n}},
        "num_positions": sum(len(chunk.flatten()) for column in positions for chunk in column.chunks),
    }


def passes(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of the rows of each forward pass: like lengths together, padding included in batch_tokens."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and (len(group) + 1) * lengths[i] > batch_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


class Body:
    """A part of distilled rows -> the same part of hidden states. Holds the base without its output layer."""

    def __init__(self, config: RunConfig, base: str, device: str, distilled: str, hidden: str) -> None:
        import torch  # here and not above: the driver deals parts and needs no model
        from transformers import AutoModelForCausalLM

        if device == "cpu":
            torch.set_num_threads(1)  # an actor has one CPU
        dtype = getattr(torch, config.model.dtype)
        try:
            model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, revision=config.model.revision)
        except (OSError, ValueError) as error:
            message = f"the base {base} cannot be loaded: {error}. Set model.base to a model that can."
            raise UserError(message) from error
        self.torch, self.model = torch, model.base_model.to(device).eval()
        self.hidden_size = model.config.get_text_config().hidden_size
        self.dtype, self.device, self.batch_tokens = config.model.dtype, device, config.hidden.batch_tokens
        self.distilled, self.hidden = distilled, hidden

    def __call__(self, shard: shards.Shard) -> dict[str, Any]:
        table = parts.read(self.distilled, shard["part"])
        rows = [row for row in table.to_pylist() if row["error"] is None and len(row["reply_ids"]) > 1]
        raw: dict[int, bytes] = {}
        for group in passes(
            [len(row["prompt_ids"]) + len(row["reply_ids"]) for row in rows], self.batch_tokens
        ):
            raw.update(zip(group, self._states([rows[i] for i in group]), strict=True))
        hidden_rows = [
            records.hidden_row(row["id"], row["prompt_ids"], row["reply_ids"], raw[i])
            for i, row in enumerate(rows)
        ]
        parts.write(
            self.hidden, shard["part"], records.hidden_table(hidden_rows, self.dtype, self.hidden_size)
        )
        return {"part": shard["part"]}

    def _states(self, rows: list[Row]) -> list[bytes]:
        """States of each row at positions P - 1 ... T - 3, as raw bytes."""
        torch = self.torch
        sequences = [row["prompt_ids"] + row["reply_ids"] for row in rows]
        longest = max(map(len, sequences))
        # Padding stands on the right, where causal attention never looks, so no mask is needed.
        padded = [sequence + [0] * (longest - len(sequence)) for sequence in sequences]
        with torch.inference_mode():
            token_BT = torch.tensor(padded, device=self.device)
            hidden_BTC = self.model(input_ids=token_BT, use_cache=False).last_hidden_state.cpu()
        states = []
        for row, hidden_TC in zip(rows, hidden_BTC, strict=True):
            first = len(row["prompt_ids"]) - 1
            wanted_TC = hidden_TC[first : first + len(row["reply_ids"]) - 1]
            states.append(wanted_TC.contiguous().view(torch.uint8).numpy().tobytes())
        return states
