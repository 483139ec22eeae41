"""Distilled rows -> hidden states of the frozen base, at the positions where a head will be asked.

Where distillation has captured them there is nothing left to compute, and where training streams them nothing to
write. Otherwise Ray Data deals the parts of distilled/ to actors that hold the base: each becomes the part of hidden/
with the same name.
"""

import functools
import logging
from collections import Counter
from typing import Any

import pyarrow.compute as pc

from medusa_ray import parts, provenance, records, shards
from medusa_ray.config import RunConfig, UserError

LOG = logging.getLogger("medusa_ray")


def run(config: RunConfig) -> str:
    """Writes hidden/*.parquet and returns the URI of hidden/; with hidden.mode `stream`, provenance alone.

    A row with an error, or too short to leave a label, has no hidden row; both are counted. Raises UserError when
    distilled/ is not finished.
    """
    from medusa_ray.states import settings_of  # here and not above: it loads torch

    distilled, hidden = (parts.absolute(config.artifact(name)) for name in ("distilled", "hidden"))
    settings = settings_of(config)
    inputs = {"distilled": provenance.digest(distilled)}
    if provenance.is_complete(hidden, settings, inputs):
        return config.artifact("hidden")
    if provenance.read(distilled) is None:
        raise UserError(f"{distilled} is not finished. Run the distill stage first.")

    # Parts belong to the settings and distilled rows that they were made from, captured or computed.
    done = parts.begin(hidden, provenance.key(settings, inputs))
    facts = _facts(distilled, config.data.loss_on)
    if config.hidden.mode == "stream":
        LOG.info(
            "stage=hidden mode=stream written=0: training computes num_positions=%d", facts["num_positions"]
        )
    else:
        blocks = [shards.block({"part": name}) for name in parts.names(distilled) if name not in done]
        device = shards.device_of(config.model)
        make_worker = functools.partial(
            Computer, config, shards.base_of(config.model), device, distilled, hidden
        )
        resources = shards.actors(
            config.hidden.num_actors,
            len(blocks),
            device,
            config.hidden.gpus_per_actor if device == "cuda" else 1,
            accelerator_type=config.hidden.accelerator_type,
            section="hidden",
        )
        for _ in shards.run("hidden", blocks, make_worker, **resources):
            pass
    provenance.write(hidden, settings, inputs, **facts)
    return config.artifact("hidden")


def _facts(distilled: str, loss_on: str) -> dict[str, Any]:
    """Counts of rows and positions, which follow from lengths alone."""
    errors: Counter[str] = Counter()
    num_in = num_positions = 0
    columns = ["prompt_ids", "reply_ids", "error"]
    for table in parts.ahead(lambda name: parts.read(distilled, name, columns), parts.names(distilled)):
        lengths = (pc.list_value_length(table[ids]).to_pylist() for ids in ("prompt_ids", "reply_ids"))
        num_in += len(table)
        for num_prompt, num_reply, error in zip(*lengths, table["error"].to_pylist(), strict=True):
            own = 0 if error else records.num_positions(num_prompt, num_reply, loss_on)
            num_positions += own
            if not own:
                errors["error in distilled" if error else "too short"] += 1
    counts = {"in": num_in, "good": num_in - errors.total(), "errors": dict(errors)}
    return {"rows": counts, "num_positions": num_positions}


class Computer:
    """A part of distilled rows -> the same part of hidden states, on disk."""

    def __init__(self, config: RunConfig, base: str, device: str, distilled: str, hidden: str) -> None:
        from medusa_ray.states import Body  # here and not above: the driver deals parts and needs no model

        self.body = Body(config.model, base, device, config.hidden, config.data.loss_on)
        self.distilled, self.hidden = distilled, hidden

    def __call__(self, shard: shards.Shard) -> dict[str, Any]:
        table = self.body.hidden_table(parts.read(self.distilled, shard["part"]))
        parts.write(self.hidden, shard["part"], table)
        return {"part": shard["part"]}
