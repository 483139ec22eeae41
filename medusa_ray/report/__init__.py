"""One run's folder -> report/report.json, report/report.html and the table that the console shows.

`numbers` turns rows into figures, `verdict` judges them, and `summary` makes report.json of both. `text` says
it on a console, `pictures` draws it as SVG, and `page` puts all into one HTML file that opens without a
network. What a run lacks is null in the JSON (or an empty list or mapping) and named in the page.
"""

import json
from typing import Any

import fsspec
import pyarrow.parquet as pq

from medusa_ray import card, provenance, records
from medusa_ray.config import UserError
from medusa_ray.report.summary import Inputs, summarise
from medusa_ray.report.text import caption, caveats, table

__all__ = ["caption", "caveats", "run", "table"]

JSON_INPUTS = {
    "heads_config": "heads/config.json",
    "tree": "heads/tree.json",
    "accuracy": "heads/accuracy.json",
    "evaluation": "evaluation/evaluation.json",
    "quality": "evaluation/quality.json",
    "bench": "bench/bench.json",
}
TRAINING = "heads/training.jsonl"
REQUESTS = "bench/requests.parquet"


def run(folder: str) -> dict[str, Any]:
    """Writes `folder`/report from what `folder` holds of heads, evaluation and bench; returns report.json.

    The heads' model card gets the figures, too.
    A report whose inputs have not changed is returned as it is. Raises UserError when there is no input.
    """
    folder = folder.rstrip("/")
    output = f"{folder}/report"
    files = [*JSON_INPUTS.values(), TRAINING, REQUESTS]
    present = {file: provenance.digest(f"{folder}/{file}") for file in files if _exists(f"{folder}/{file}")}
    if not present:
        raise UserError(
            f"{folder} holds none of {', '.join(files)}, so there is nothing to report. "
            "Give the output folder of a run, or run `medusa-ray evaluate` or `medusa-ray bench` first."
        )
    settings = {"schema_version": records.SCHEMA_VERSION, "versions": provenance.versions()}
    if provenance.is_complete(output, settings, present):
        return provenance.read_json(f"{output}/report.json")

    from medusa_ray.report import page  # matplotlib takes a second to load, and a finished report needs none

    inputs = _read(folder, set(present))
    report = summarise(inputs)
    provenance.write_json(f"{output}/report.json", report)
    with fsspec.open(f"{output}/report.html", "w", encoding="utf-8") as file:
        file.write(page.render(report, inputs))
    if card.weights_in(f"{folder}/heads"):  # figures alone make a report, but no card
        card.write(f"{folder}/heads")
    provenance.write(output, settings, present)
    return report


def _exists(uri: str) -> bool:
    filesystem, path = fsspec.core.url_to_fs(uri)
    return bool(filesystem.exists(path))


def _read(folder: str, present: set[str]) -> Inputs:
    found: dict[str, Any] = {
        name: provenance.read_json(f"{folder}/{file}")
        for name, file in JSON_INPUTS.items()
        if file in present
    }
    if TRAINING in present:
        with fsspec.open(f"{folder}/{TRAINING}", "r", encoding="utf-8") as file:
            found["training"] = [json.loads(line) for line in file if line.strip()]
    if REQUESTS in present:
        with fsspec.open(f"{folder}/{REQUESTS}", "rb") as file:
            requests = records.check_columns(pq.read_table(file), records.REQUESTS, f"{folder}/{REQUESTS}")
        found["requests"] = requests.drop_columns(["text"]).to_pylist()
    origins = {stage: provenance.read(f"{folder}/{stage}") for stage in ("heads", "evaluation", "bench")}
    return Inputs(**found, provenance={stage: origin for stage, origin in origins.items() if origin})
