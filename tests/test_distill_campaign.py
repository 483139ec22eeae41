"""Distilling under kills, on the demo's chats.

    pytest -m nightly tests/test_distill_campaign.py -s

takes ten minutes on two quiet cores, and prints what it measured.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
import yaml

from medusa_ray import distill, parts, provenance, records
from medusa_ray.chat import Chat
from medusa_ray.config import RunConfig, parse
from medusa_ray.demo import chats
from medusa_ray.demo.quality import BASE

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.timeout(3600)]

NUM_ROWS = 2000


def actors() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "MapWorker" in process.name()]


def write_run(folder: Path) -> RunConfig:
    chat = Chat.load(str(BASE))
    rows = [
        {"id": f"{row['id']}/0", "prompt_ids": chat.prompt_ids(row["messages"][:-1])}
        for row in chats.chats("train", NUM_ROWS)
    ]
    parts.write(f"{folder}/prompts/train", parts.part_name(0), pa.Table.from_pylist(rows, records.PROMPTS))
    longest = max(len(row["prompt_ids"]) for row in rows)
    provenance.write(f"{folder}/prompts", {}, {}, splits={"train": {"longest_prompt_tokens": longest}})
    raw = {
        "output": str(folder),
        "model": {"base": str(BASE), "dtype": "float32", "device": "cpu"},
        "data": {"train": "-"},
        "distill": {"num_actors": 2, "max_new_tokens": 128, "rows_per_part": 16},
    }
    return parse(RunConfig, raw, "test")


def rows_of(config: RunConfig, artifact: str) -> list[dict[str, Any]]:
    folder = config.artifact(artifact)
    return [row for name in parts.names(folder) for row in parts.read(folder, name).to_pylist()]


def test_twenty_kills_lose_no_row_and_repeat_none(ray_cluster: None, tmp_path: Path) -> None:
    """Actors and drivers, at any moment: rows and states are those of a run that nobody disturbed, to the bit."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = write_run(tmp_path / "whole"), write_run(tmp_path / "killed")
    distill.run(whole)

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(killed.model_dump()))
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "medusa_ray.cli", "distill", str(file)]
    numbers = random.Random(0)
    kills: list[str] = []
    driver: subprocess.Popen[Any] | None = None
    while len(kills) < 20:
        if driver is None:
            driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        kills.append(numbers.choice(["actor", "driver"]))
        while kills[-1] == "actor" and not actors():
            time.sleep(0.1)
        time.sleep(numbers.uniform(0, 8))
        assert driver.poll() is None, f"the run ended after {kills}"
        if kills[-1] == "actor" and (alive := actors()):
            numbers.choice(alive).kill()
        else:
            kills[-1] = "driver"
            driver.kill()
            driver.wait()
            driver = None
    if driver is None:
        driver = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    assert driver.wait() == 0
    record = provenance.read(killed.artifact("distilled"))
    assert record is not None
    print(
        f"\nkills={kills.count('actor')} of actors, {kills.count('driver')} of drivers; rows={record['rows']} "
        f"retries={record['retries']} occupancy={record['occupancy']}"
    )
    assert record["rows"] == {"in": NUM_ROWS, "good": NUM_ROWS, "errors": {}}
    for artifact in ("distilled", "hidden"):
        assert rows_of(killed, artifact) == rows_of(whole, artifact)
