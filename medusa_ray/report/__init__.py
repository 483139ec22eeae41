"""One run's folder -> report/: report.json and its schema, report.html, summary.md, and each picture as files.

`numbers` and `ratios` turn rows into figures, `comparable` and `verdict` judge them, and `summary` makes report.json
of it all. `text` says it on a console, `markdown` for GitHub, `pictures` draws it, and `page` puts it into one HTML
file that opens without a network; `comparison` puts two runs side by side. What a run lacks is null in the JSON (or
an empty list or mapping) and named in the page.
"""

import json
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from medusa_ray import card, provenance, records
from medusa_ray.config import UserError
from medusa_ray.report.comparison import comparison_table
from medusa_ray.report.summary import Inputs, summarise
from medusa_ray.report.text import caption, caveats, measured_loads, table

__all__ = ["caption", "caveats", "compare", "comparison_table", "run", "table"]

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

    inputs = _read(folder, set(present))
    report = summarise(inputs)
    _write(output, report, inputs)
    if card.weights_in(f"{folder}/heads"):  # figures alone make a report, but no card
        card.write(f"{folder}/heads")
    provenance.write(output, settings, present)
    return report


def _write(output: str, report: dict[str, Any], inputs: Inputs) -> None:
    # matplotlib takes a second to load, and a finished report needs none.
    from medusa_ray.report import markdown, page, pictures, schema

    provenance.write_json(f"{output}/report.json", report)
    provenance.write_json(f"{output}/report.schema.json", schema.json_schema(schema.Report))
    drawn = pictures.draw(report, inputs)
    files = {"report.html": page.render(report, inputs, drawn), "summary.md": markdown.render(report)}
    for name, content in files.items():
        _write_text(f"{output}/{name}", content)
    for name, picture in drawn.items():
        _write_text(f"{output}/figures/{name}.svg", picture.svg)
        with fsspec.open(f"{output}/figures/{name}.png", "wb", auto_mkdir=True) as file:
            file.write(picture.png())
        _write_columns(f"{output}/figures/{name}", pa.table(picture.columns))
    _write_columns(f"{output}/figures/benchmark", benchmark(report))


def _write_text(uri: str, content: str) -> None:
    with fsspec.open(uri, "w", encoding="utf-8", auto_mkdir=True) as file:
        file.write(content)


def _write_columns(uri: str, columns: pa.Table) -> None:
    with fsspec.open(f"{uri}.csv", "wb") as file:
        pyarrow.csv.write_csv(columns, file)
    with fsspec.open(f"{uri}.parquet", "wb") as file:
        pq.write_table(columns, file)


def benchmark(report: dict[str, Any]) -> pa.Table:
    """The figures of every arm at every load, a line each; a column each for percentiles and ends of intervals."""
    lines = []
    for load, arm, measured in measured_loads(report):
        line = {"load": load, "arm": arm, **{k: v for k, v in measured.items() if not isinstance(v, dict)}}
        for percent in ("p50", "p95", "p99"):
            line |= {f"{name}_{percent}": value for name, value in measured[percent].items()}
        for name, bounds in measured["ci95"].items():
            line |= {f"{name}_low": bounds and bounds[0], f"{name}_high": bounds and bounds[1]}
        lines.append(line)
    return pa.Table.from_pylist(lines)


def compare(folder_a: str, folder_b: str, output: str) -> dict[str, Any]:
    """Writes compare.json and compare.html of two runs into `output`, and their reports where they are lacking.

    Returns compare.json. Raises UserError when a run has nothing to report.
    """
    from medusa_ray.report import comparison, schema

    if folder_a.rstrip("/") == folder_b.rstrip("/"):
        raise UserError(f"A and B are both {folder_a}; give the folders of two runs.")
    found = comparison.compare({folder: run(folder) for folder in (folder_a, folder_b)})
    provenance.write_json(f"{output}/compare.json", found)
    provenance.write_json(f"{output}/compare.schema.json", schema.json_schema(schema.Comparison))
    _write_text(f"{output}/compare.html", comparison.render(found))
    return found


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
        found["requests"] = requests.to_pylist()
    origins = {stage: provenance.read(f"{folder}/{stage}") for stage in ("heads", "evaluation", "bench")}
    return Inputs(**found, provenance={stage: origin for stage, origin in origins.items() if origin})
