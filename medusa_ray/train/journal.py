"""Figures of a run -> training.jsonl, TensorBoard and other trackers. Rank 0 keeps it.

# H heads
"""

import importlib.util
import json
import math
import time
from collections.abc import Callable
from typing import Any

import fsspec

from medusa_ray.config import TrainConfig, UserError

CURVE = "training.jsonl"
WRITE_S = 1.0  # at least, between two times that it is written
Log = Callable[[dict[str, float], int], None]  # figures by name, of a step


class Journal:
    def __init__(self, heads: str, train: TrainConfig, history: list[dict[str, Any]]) -> None:
        """heads: URI of heads/. history: what the run has recorded before it was resumed."""
        self.history, self.written_s = history, -math.inf
        self.filesystem, self.folder = fsspec.core.url_to_fs(heads)
        self.filesystem.makedirs(self.folder, exist_ok=True)
        first = history[-1]["step"] + 1 if history else 0
        is_local = "file" in self.filesystem.protocol
        place = self.folder if is_local else heads
        self.logs = [TRACKERS[name](place, train, first) for name in train.trackers]

    def add(self, record: dict[str, Any]) -> None:
        """record: a line of training.jsonl (records.py)."""
        self.history.append(record)
        if time.monotonic() - self.written_s > WRITE_S:
            self.write()
        figures = dict(flat(record))
        for log in self.logs:
            log(figures, record["step"])

    def write(self) -> None:
        """Whole: object stores cannot append, and what a resumed run repeats must not be there twice."""
        text = "".join(json.dumps(line) + "\n" for line in self.history)
        self.filesystem.pipe_file(f"{self.folder}/{CURVE}", text.encode())
        self.written_s = time.monotonic()


def flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """held_out/top1/head_0 and the like; the step itself left out."""
    found: list[tuple[str, float]] = []
    for name, value in record.items():
        if isinstance(value, dict):
            found += flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            found += [(f"{prefix}{name}/head_{head}", figure) for head, figure in enumerate(value)]
        elif name != "step":
            found.append((f"{prefix}{name}", value))
    return found


def tensorboard(place: str, train: TrainConfig, first: int) -> Log:
    from torch.utils.tensorboard import SummaryWriter  # here, since the other ranks need none

    # What a killed run had logged after its last checkpoint is logged again.
    board = SummaryWriter(f"{place}/tensorboard", purge_step=first)

    def log(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            board.add_scalar(name, value, step)
        board.flush()

    return log


def wandb(place: str, train: TrainConfig, first: int) -> Log:
    module: Any = importlib.import_module("wandb")
    # One id for all starts of a run, so that a resumed one goes on in the same curve.
    name = run_name(place)
    run = module.init(project="medusa_ray", name=name, id=name, resume="allow", config=train.model_dump())
    return lambda figures, step: run.log(figures, step=step)


def mlflow(place: str, train: TrainConfig, first: int) -> Log:
    module: Any = importlib.import_module("mlflow")
    module.set_experiment("medusa_ray")
    module.start_run(run_name=run_name(place))
    module.log_params(train.model_dump())
    return lambda figures, step: module.log_metrics(figures, step=step)


def run_name(place: str) -> str:
    """Of the folder that heads/ is in."""
    return place.rstrip("/").split("/")[-2]


def check_trackers(train: TrainConfig) -> None:
    """Raises UserError when the package of one is missing."""
    for name in train.trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"train.trackers has {name!r}, but there is no package of that name. pip install {name}, or leave "
                "it out."
            )


TRACKERS: dict[str, Callable[[str, TrainConfig, int], Log]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
}


def read_curve(curve: str) -> list[dict[str, Any]]:
    """Records of training.jsonl, which may be about to be written."""
    try:
        with fsspec.open(curve, "r", encoding="utf-8") as file:
            return [json.loads(text) for text in file if text.endswith("\n")]
    except FileNotFoundError:
        return []


def line(record: dict[str, Any]) -> str:
    """A record as the console shows it."""
    top1 = ",".join(f"{value:.3f}" for value in record["top1"])
    text = f"stage=train step={record['step']} of={record['of']} loss={record['loss']:.3f} top1={top1}"
    if "positions_per_s" in record:
        text += f" positions_per_s={record['positions_per_s']:.0f} memory_gib={record['memory_gib']:.2f}"
    if "share_of_peak" in record:
        text += f" share_of_peak={record['share_of_peak']:.3f}"
    if held_out := record.get("held_out"):
        text += f" held_out_loss={held_out['loss']:.3f}"
        text += f" base_kl={held_out['base_kl']:.4f}" if "base_kl" in held_out else ""
        text += "".join(f" {name}={value:.2f}" for name, value in held_out["tokens_per_step"].items())
    return text
