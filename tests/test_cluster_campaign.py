"""Training on a cluster of two nodes, of which one is killed.

    pytest -m nightly tests/test_cluster_campaign.py -s

takes eight minutes on two quiet cores, and prints what it measured. tests/test_distill_campaign.py and
tests/test_serve_campaign.py kill nodes under the other stages.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import yaml
from ray.cluster_utils import Cluster
from test_distill_campaign import NODE, kill_node
from test_train import changed, curve_of, what_is_learnt, write_run

from medusa_ray import shards, train
from medusa_ray.config import RunConfig, UserError
from medusa_ray.medusa.heads import WEIGHTS
from medusa_ray.train import checkpoints

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.timeout(1800)]
NUM_ROWS = 800  # of 10 positions each
SETTINGS = {
    "batch_size": 4,
    "logging_steps": 10,
    "save_steps": 200,
    "max_failures": 20,
    "placement": "spread",
}


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
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def step_of(config: RunConfig) -> int:
    curve = curve_of(config)
    return curve[-1]["step"] if curve else 0


def start(config: RunConfig) -> subprocess.Popen[bytes]:
    """The command, which looks every 5 s whether there is room for more workers."""
    file = Path(config.output, "run.yaml")
    file.write_text(yaml.safe_dump(config.model_dump()))
    command = "from medusa_ray import cli, train; train.RESIZE_S = 5; cli.main()"
    return subprocess.Popen([sys.executable, "-c", command, "train", str(file)], stderr=subprocess.DEVNULL)


def wait_for(step: int, config: RunConfig, driver: subprocess.Popen[bytes]) -> None:
    while step_of(config) < step:
        assert driver.poll() is None, f"the run ended with {driver.returncode} at step {step_of(config)}"
        time.sleep(0.1)


def pause_of(config: RunConfig, driver: subprocess.Popen[bytes]) -> float:
    """Seconds until the run has come further than it is."""
    began_s = time.monotonic()
    wait_for(step_of(config) + 1, config, driver)
    return time.monotonic() - began_s


def test_a_node_that_is_replaced_leaves_the_heads_as_they_were(cluster: Cluster, tmp_path: Path) -> None:
    """Twice, with as many workers again: to the bit."""
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = (
        write_run(tmp_path / name, num_rows=NUM_ROWS, epochs=3, **SETTINGS) for name in ("whole", "killed")
    )
    assert start(whole).wait() == 0
    driver = start(killed)
    for step in (500, 1800):
        wait_for(step, killed, driver)
        kill_node(cluster)
        cluster.add_node(**NODE)
        print(f"\nreplaced after step {step}: {pause_of(killed, driver):.0f} s to the next new one")
    assert driver.wait() == 0
    assert what_is_learnt(killed) == what_is_learnt(whole)
    weights = [Path(run.artifact("heads"), WEIGHTS).read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]


def test_training_goes_on_with_the_nodes_that_are_left_and_those_that_join(
    cluster: Cluster, tmp_path: Path
) -> None:
    """A step takes as many positions whatever the number of workers, and each position of an epoch once: so the run
    has the steps of an undisturbed one, but for one more where a plan was cut."""
    num_epochs, steps_per_epoch = 10, NUM_ROWS * 10 // 8
    config = write_run(tmp_path, num_rows=NUM_ROWS, num_workers="1-2", epochs=num_epochs, **SETTINGS)
    driver = start(config)
    wait_for(500, config, driver)
    assert workers_of(config) == 2
    kill_node(cluster)
    print(f"\na node lost: {pause_of(config, driver):.0f} s to the next new step")
    wait_for(step_of(config) + 500, config, driver)
    assert workers_of(config) == 1
    cluster.add_node(**NODE)
    began_s = time.monotonic()
    while workers_of(config) == 1:
        assert driver.poll() is None, "the run has ended on one node"
        time.sleep(0.5)
    print(f"a node joined: {time.monotonic() - began_s:.0f} s to the first checkpoint with it")
    assert driver.wait() == 0
    curve = curve_of(config)
    assert [line["step"] for line in curve[:-1]] == list(range(10, curve[-1]["step"], 10))
    assert curve[-1]["epoch"] == num_epochs
    assert num_epochs * steps_per_epoch <= curve[-1]["step"] <= num_epochs * steps_per_epoch + 2
    assert curve[-1]["top1"] == [1.0, 1.0, 1.0]


def workers_of(config: RunConfig) -> int:
    """Of the newest checkpoint."""
    newest = checkpoints.newest(config.artifact("training"))
    return newest.state["plan"]["num_workers"] if newest else 0


def test_work_goes_to_nodes_with_the_accelerator_that_it_names(cluster: Cluster, tmp_path: Path) -> None:
    """Ray Data, too, hands the wish on to its actors."""
    node = cluster.add_node(**NODE, resources={"accelerator_type:L4": 1})
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        blocks = [shards.block({"number": number}) for number in range(8)]
        pool = shards.actors("auto", len(blocks), "cpu", accelerator_type="L4")
        found = list(shards.run("test", blocks, lambda: lambda shard: {"node": shards.node()}, **pool))
        assert [result["node"] for result in found] == [node.node_id] * 8
        config = write_run(tmp_path, num_workers=2, accelerator_type="L4")
        with pytest.raises(UserError, match=r"train.num_workers is 2, .* but the cluster has 1"):
            train.run(config)
        train.run(changed(config, num_workers=1))
    finally:
        ray.shutdown()
