"""What joint training brings on the demo's base, beside heads alone, both on the same distilled rows.

    pytest -m nightly tests/test_medusa2_campaign.py -s

takes nine minutes on a quiet core, and prints both side by side.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from medusa_ray import provenance
from medusa_ray.cli import STAGES, run_stage
from medusa_ray.config import JointConfig, RunConfig
from medusa_ray.demo.pipeline import FULL, Demo

JOINT = JointConfig(epochs=1, batch_size=16, warmup_steps=10, heads_weight=0.1)

pytestmark = [pytest.mark.nightly, pytest.mark.ray, pytest.mark.timeout(3600)]


def figures(config: RunConfig) -> dict[str, Any]:
    """Of prompts that neither training has seen; after joint training the adapted base answers them."""
    acceptance = provenance.read_json(f"{config.artifact('heads')}/accuracy.json")["acceptance"]
    quality = provenance.read_json(f"{config.artifact('evaluation')}/evaluation.json")["quality"]
    return {**acceptance, **quality}


def test_joint_training_accepts_more_and_says_as_much_that_is_right(
    ray_cluster: None, tmp_path: Path
) -> None:
    demo = Demo(tmp_path / "medusa1", None, FULL, None, None)
    demo.out.mkdir()
    demo.write_chats()
    settings = {"num_parity": 40, "num_speed": 0, "compile": False}
    alone = demo.config.model_copy(
        update={
            "train": demo.config.train.model_copy(update={"num_workers": 1, "batch_size": 256}),
            "evaluate": demo.config.evaluate.model_copy(update=settings),
        }
    )
    for stage in STAGES:
        run_stage(stage, alone)
    both = alone.model_copy(update={"output": str(tmp_path / "medusa2"), "joint": JOINT})
    os.mkdir(both.output)
    for name in ("prompts", "distilled", "hidden"):
        os.symlink(alone.artifact(name), both.artifact(name))
    shutil.copytree(
        alone.artifact("heads"), both.artifact("warm_heads")
    )  # which are what it would train first
    for stage in ("train", "evaluate"):
        run_stage(stage, both)
    before, after = figures(alone), figures(both)
    print()
    for name in before:
        print(f"{name:20} medusa1={before[name]:.3f} medusa2={after[name]:.3f}")
    parity = provenance.read_json(f"{both.artifact('evaluation')}/evaluation.json")["parity"]
    assert parity["token_exact"] + parity["near_ties"] == parity["prompts"] == 40
    assert after["exact_match"] >= before["exact_match"] - 0.02
    assert after["chain"] >= before["chain"] + 0.05
    assert after["calibrated_8"] >= before["calibrated_8"] + 0.05
