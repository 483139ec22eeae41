"""Pictures of whole, poor and crowded runs: texts that do not overlap, files that stand alone, numbers that agree."""

import csv
import itertools
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from test_report import RAMP, STEP_TIMES, WINNING, open_rows, traffic_rows, write_run

from medusa_ray import report as reporting
from medusa_ray.report import _read, pictures
from medusa_ray.report.drawing import Picture
from medusa_ray.report.style import STYLE
from medusa_ray.report.summary import Inputs, summarise

MANY_LOADS = {f"concurrency={n}": 1.6 - 0.1 * place for place, n in enumerate((1, 2, 4, 8, 16, 32, 64))}


def drawn(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Picture]:
    write_run(folder, rows, **changes)
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    inputs = _read(str(folder), present)
    return pictures.draw(summarise(inputs), inputs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Picture]:
    return drawn(tmp_path_factory.mktemp("whole"), traffic_rows(WINNING, 12) + open_rows())


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Picture]:
    """Seven loads, five arms with long names, a tree of sixty-three nodes, five heads."""
    rows = traffic_rows(MANY_LOADS | {"throughput": 0.9}, 6, num_rounds=1)
    peers = ("vllm with the same heads", "transformers serve", "vllm without speculation")
    rows += [row | {"arm": name} for name in peers for row in rows if row["arm"] == "baseline"]
    walks = [
        [*head, rank]
        for depth in range(3)
        for head in itertools.product(range(3), repeat=depth)
        for rank in range(3)
    ]
    accuracy = {
        "heads": {"top1": [0.6, 0.59, 0.58, 0.57, 0.56], "top5": [0.9] * 5},
        "acceptance": {"chain": 1.97, **{f"calibrated_{n}": 2 + n / 90 for n in (8, 16, 32, 64)}},
    }
    lines = [
        {"step": n, "head_loss": [3 - n / 10] * 5, "top1": [n / 20] * 5, "top5": [n / 12] * 5}
        for n in range(10)
    ]
    return drawn(
        tmp_path_factory.mktemp("crowded"),
        rows,
        **{
            "heads/tree.json": {"paths": walks, "nodes": len(walks), "calibrated_on": 100},
            "heads/accuracy.json": accuracy,
            "heads/training.jsonl": lines,
        },
    )


def boxes(picture: Picture) -> list[tuple[str, Bbox]]:
    """Every text that is drawn, with the box that it takes, in pixels of the figure."""
    renderer = FigureCanvasAgg(picture.figure).get_renderer()
    texts = [text for text in picture.figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts if is_drawn(text, picture)]


def is_drawn(text: Text, picture: Picture) -> bool:
    """Matplotlib keeps labels of ticks beyond the limits, and of axes that are off, and does not draw them."""
    for axis in (picture.axes.xaxis, picture.axes.yaxis):
        for tick in axis.get_major_ticks():
            if text in (tick.label1, tick.label2):
                low, high = sorted(axis.get_view_interval())
                return picture.axes.axison and bool(low <= tick.get_loc() <= high)
    return True


@pytest.mark.parametrize("run", ["whole", "crowded"])
def test_no_text_overlaps_another_or_leaves_its_picture(run: str, request: pytest.FixtureRequest) -> None:
    faults = []
    for name, picture in request.getfixturevalue(run).items():
        picture.figure.set_dpi(100)
        found, room = boxes(picture), picture.figure.bbox
        assert found, name
        for (one, box), (other, its_box) in itertools.combinations(found, 2):
            inner = Bbox.intersection(box, its_box)
            if inner is not None and inner.width > 1 and inner.height > 1:
                faults.append(f"{name}: {one!r} and {other!r}")
        for text, box in found:
            if box.x0 < room.x0 - 1 or box.x1 > room.x1 + 1 or box.y0 < room.y0 - 1 or box.y1 > room.y1 + 1:
                faults.append(f"{name}: {text!r} leaves")
    assert not faults


def test_every_picture_of_the_catalogue_is_drawn_of_a_whole_run(whole: dict[str, Picture]) -> None:
    assert list(whole) == [
        "speedup", "pareto", "token_time", "first_token", "token_time_by_rate", "first_token_by_rate", "goodput",
        "ramp", "engine", "step_time", "step_cost",
        "by_position", "step_sizes", "acceptance", "tree", "parity", "quality",
        "head_loss", "top1", "held_out",
    ]  # fmt: skip
    assert all(picture.name == name for name, picture in whole.items())


def test_a_run_that_has_nothing_has_no_pictures() -> None:
    assert pictures.draw(summarise(Inputs()), Inputs()) == {}


def test_a_picture_says_what_its_numbers_say(whole: dict[str, Picture]) -> None:
    assert whole["ramp"].columns["value"][:3] == [number for _, number in RAMP["steps"]]
    assert whole["step_cost"].columns["rows"] == [n for n in (1, 2, 4, 8, 16) for _ in range(3)]
    assert whole["step_cost"].columns["seconds"][1] == STEP_TIMES["1"]["4"]
    parts = whole["step_time"].columns
    assert all(
        sum(step) > 0 for step in zip(parts["base_ms"], parts["tree_ms"], parts["beside_ms"], strict=True)
    )
    tokens = zip(whole["step_sizes"].columns["tokens"], whole["step_sizes"].columns["share"], strict=True)
    mean = sum(number * share for number, share in tokens)
    assert f"{mean:.2f}" in "".join(text for text, _ in boxes(whole["step_sizes"]))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("files"), traffic_rows(WINNING, 8) + open_rows((4,)))
    reporting.run(str(folder))
    return folder / "report" / "figures"


def test_each_picture_is_there_as_png_svg_csv_and_parquet(files: Path) -> None:
    names = {path.stem for path in files.glob("*.png")}
    assert len(names) == 20
    for name in names:
        assert (files / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        svg = (files / f"{name}.svg").read_text(encoding="utf-8")
        assert svg.startswith("<?xml")
        assert not re.search(r'(href|src)="(?!#)', svg), "a picture fetches nothing"
    for name in (*names, "benchmark"):
        table = pq.read_table(files / f"{name}.parquet")
        with (files / f"{name}.csv").open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert table.num_rows == len(lines) > 0, name
        assert table.column_names == list(lines[0])


def test_the_benchmark_table_keeps_every_figure_with_its_ends(files: Path) -> None:
    table = pq.read_table(files / "benchmark.parquet")
    assert {"load", "arm", "tpot_ms", "tpot_ms_p95", "tpot_ms_low", "tpot_ms_high"} <= set(table.column_names)
    first = table.to_pylist()[0]
    assert (first["load"], first["arm"]) == ("synchronous", "baseline")
    assert first["tpot_ms_low"] < first["tpot_ms"] < first["tpot_ms_high"]


def test_a_page_scrolls_wide_tables_and_not_itself(files: Path) -> None:
    page = (files.parent / "report.html").read_text(encoding="utf-8")
    assert page.count("<table") == page.count('<div class="scroll"><table')
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page
    assert ".scroll { overflow-x: auto;" in STYLE
    assert "@media print" in STYLE
    assert not re.search(
        r"(min-)?width: \d{3,}px",
        STYLE.replace("max-width", "").replace("svg.wide { min-width: 600px; }", ""),
    ), "no box is wider than a phone"
