"""Training on a cluster of two nodes, of which one is killed.

    pytest -m nightly tests/test_cluster_campaign.py -s

takes eight minutes on two quiet cores, and prints what it measured. tests/test_distill_campaign.py and
tests/test_serve_campaign.py kill nodes under the other stages.
"""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from test_distill_campaign import NODE, kill_node
from test_train import curve_of, what_is_learnt, write_run

from medusa_ray import provenance, train
from medusa_ray.config import RunConfig
from medusa_ray.medusa.heads import WEIGHTS

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.timeout(1800)]
NUM_ROWS = 1600  # of 10 positions each
SETTINGS = {"batch_size": 4, "logging_steps": 1, "save_steps": 200, "max_failures": 20, "placement": "spread"}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head that has the driver alone, and two nodes with room for a worker each."""
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "3")
    cluster = Cluster(
        initialize_head=True, head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False}
    )
    for _ in range(2):
        cluster.add_node(**NODE)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def step_of(config: RunConfig) -> int:
    curve = curve_of(config)
    return curve[-1]["step"] if curve else 0


def meanwhile(events: list[tuple[int, Callable[[], Any]]], config: RunConfig) -> threading.Thread:
    """What happens once the run has come to a step."""

    def wait() -> None:
        for step, happen in events:
            while step_of(config) < step:
                time.sleep(0.1)
            happen()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def test_a_node_that_is_replaced_leaves_the_heads_as_they_were(cluster: Cluster, tmp_path: Path) -> None:
    """Twice, with as many workers again: to the bit."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (
        write_run(tmp_path / name, num_rows=NUM_ROWS, epochs=4, **SETTINGS) for name in ("whole", "killed")
    )
    began_s = time.monotonic()
    train.run(whole)
    whole_s = time.monotonic() - began_s

    def replace() -> None:
        kill_node(cluster)
        time.sleep(5)
        cluster.add_node(**NODE)

    events = meanwhile([(700, replace), (4000, replace)], killed)
    began_s = time.monotonic()
    train.run(killed)
    print(f"\n2 nodes replaced: {time.monotonic() - began_s:.0f} s, and {whole_s:.0f} s without")
    assert not events.is_alive()
    assert what_is_learnt(killed) == what_is_learnt(whole)
    weights = [Path(run.artifact("heads"), WEIGHTS).read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]


def test_training_goes_on_with_the_nodes_that_are_left_and_those_that_join(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step takes as many positions whatever the number of workers, and each position of an epoch once: so the run
    has the steps of an undisturbed one, but for one more where a plan was cut."""
    monkeypatch.setattr(train, "RESIZE_S", 5.0)
    config = write_run(tmp_path, num_rows=NUM_ROWS, num_workers="1-2", epochs=24, **SETTINGS)
    sizes: dict[int, int] = {}  # workers by the step at which they were seen

    def watch() -> None:
        while (step := step_of(config)) < 24 * 2000 - 10:
            alive = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            sizes[step] = len(alive)
            time.sleep(0.5)

    threading.Thread(target=watch, daemon=True).start()
    moments: list[float] = []

    def lose() -> None:
        moments.append(time.monotonic())
        kill_node(cluster)

    def join() -> None:
        moments.append(time.monotonic())
        cluster.add_node(**NODE)

    events = meanwhile([(700, lose), (3000, join)], config)
    train.run(config)
    assert not events.is_alive()
    curve = curve_of(config)
    assert [line["step"] for line in curve] == list(range(1, curve[-1]["step"] + 1))
    assert curve[-1]["epoch"] == 24
    assert 24 * 2000 <= curve[-1]["step"] <= 24 * 2000 + 2
    record = provenance.read(config.artifact("heads"))
    assert record is not None
    assert record["num_positions"] == NUM_ROWS * 10
    assert curve[-1]["top1"] == [1.0, 1.0, 1.0]
