"""A report and what it was made of -> its pictures, and the names of those that the run has nothing for."""

from typing import Any

from medusa_ray.report.drawing import Picture
from medusa_ray.report.pictures import acceptance, speed, steps, training
from medusa_ray.report.summary import Inputs


def draw(report: dict[str, Any], inputs: Inputs) -> dict[str, Picture]:
    """By name, in the order of the page; without those that the run has nothing for."""
    return {name: picture for name, picture in _all(report, inputs).items() if picture}


def _all(report: dict[str, Any], inputs: Inputs) -> dict[str, Picture | None]:
    info = inputs.bench.get("arms", {}).get("medusa", {}).get("info")
    return {
        "speedup": speed.speedup(report),
        "pareto": speed.pareto(report),
        "token_time": speed.token_time(report),
        "first_token": speed.first_token(report),
        "token_time_by_rate": speed.token_time_by_rate(report),
        "first_token_by_rate": speed.first_token_by_rate(report),
        "goodput": speed.goodput(report),
        "ramp": speed.ramp(inputs.bench.get("ramp")),
        "engine": speed.engine(report),
        "step_time": steps.step_time(report, info),
        "step_cost": steps.step_cost(report, info),
        "by_position": acceptance.by_position(report),
        "step_sizes": acceptance.step_sizes(report),
        "acceptance": acceptance.acceptance(report),
        "tree": acceptance.tree(report["tree"]["paths"]),
        "parity": training.parity(report),
        "quality": training.quality(report),
        "head_loss": training.curves(inputs.training, "head_loss"),
        "top1": training.curves(inputs.training, "top1"),
        "top5": training.curves(inputs.training, "top5"),
        "held_out": training.held_out(inputs.training),
    }
