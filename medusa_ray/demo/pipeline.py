"""`medusa-ray demo`: the whole path, from chats to a report, on embedded text-to-SQL chats or the user's own.

Every step leaves its artifact with a provenance in the output folder and is skipped when that is whole and
its config unchanged, so a demo killed anywhere goes on when called again, and one that ended does nothing.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import pyarrow.parquet as pq
import yaml

from medusa_ray import provenance
from medusa_ray import report as reporting
from medusa_ray.cli import STAGES, figures, run_stage
from medusa_ray.cli.cluster import check_port, check_writable, cluster, prepare_ray
from medusa_ray.cli.console import show
from medusa_ray.cli.progress import step
from medusa_ray.config import RunConfig, ServeConfig, Strict, TargetConfig, TrafficConfig, UserError, parse
from medusa_ray.demo import chats as generator

SHIPPED_BASE = Path(__file__).parent / "base"
SEED = 0
BASE_SEED = 1  # chats that a base is trained on are not those that its heads are
HOST = "127.0.0.1"
OBJECT_STORE_BYTES = 300 * 2**20
ARTIFACTS = ("chats", "prompts", "distilled", "hidden", "heads", "evaluation", "bench", "report")
ARMS = ("baseline", "medusa")


@dataclass(frozen=True)
class Size:
    """How much of everything one demo does: where its time is traded against the width of its intervals."""

    num_train: int
    num_test: int
    num_out_of_domain: int
    epochs: int
    num_parity: int
    num_speed: int
    num_requests: int
    rounds: int
    max_seconds: float  # of one arm at one load in one round
    base_samples: int  # chats, with repetition, that a base trained on the spot sees


FULL = Size(
    num_train=1600, num_test=250, num_out_of_domain=80, epochs=3, num_parity=200, num_speed=40,
    num_requests=32, rounds=2, max_seconds=30, base_samples=25_000,
)  # fmt: skip
FAST = Size(
    num_train=200, num_test=60, num_out_of_domain=30, epochs=4, num_parity=20, num_speed=8,
    num_requests=8, rounds=1, max_seconds=30, base_samples=2_000,
)  # fmt: skip


def run(
    out: Path,
    data: str | None = None,
    fast: bool = False,
    train_base: str | None = None,
    port: int | None = None,
) -> None:
    """Runs all eight steps into the folder `out` and shows what they found.

    `data` names the user's own chats. The shipped base does not know them, so one is trained on the spot, as
    `train_base`, a name of its size, asks for too. Raises UserError for what cannot be read, written or
    served.
    """
    started = time.monotonic()
    if data and not train_base:
        train_base = "0.9m"
    demo = Demo(out.resolve(), data, FAST if fast else FULL, train_base, port)
    if demo.is_complete():
        print(f"{demo.out} is complete; nothing to do.")
    else:
        demo.check()
        with locked(demo.out):
            demo.run()
    show(provenance.read_json(f"{demo.out}/report/report.json"))
    print(f"report   {demo.out}/report/report.html")
    print(f"took     {time.monotonic() - started:.1f} s")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second demo off the folder. The kernel drops the lock with the process, however that ends."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another `medusa-ray demo` is at work in {out}. Wait until it ends, or choose another --out."
            ) from None
        yield


class Demo:
    """The steps of one demo, and the files that they share."""

    def __init__(
        self, out: Path, data: str | None, size: Size, train_base: str | None, port: int | None
    ) -> None:
        self.out, self.data, self.size, self.train_base, self.port = out, data, size, train_base, port
        self.base = str(out / "base") if train_base else str(SHIPPED_BASE)
        self.config = run_config(out, self.base, data, size)
        self.settings = {"size": asdict(size), "train_base": train_base}

    def is_complete(self) -> bool:
        return provenance.is_complete(str(self.out), self.settings, self.inputs())

    def inputs(self) -> dict[str, str]:
        """Digests of what came in and of all artifacts: a demo counts as whole only while each of them is."""
        inputs = {name: provenance.digest(str(self.out / name)) for name in ARTIFACTS}
        inputs["base"] = provenance.digest(self.base)
        if self.data:
            inputs["data"] = provenance.digest(self.data)
        return inputs

    def check(self) -> None:
        """Raises UserError for all that can be known to fail before anything is written."""
        check_writable(str(self.out))
        if self.port:
            check_port(HOST, self.port)
        prepare_ray()
        if self.data:
            self.own_chats()

    def run(self) -> None:
        with step("chats") as facts:
            self.write_chats()
            facts.update(figures(str(self.out / "chats")))
        write_yaml(self.out / "run.yaml", self.config)
        from medusa_ray import serve

        os.environ.update(serve.environment())
        with cluster(OBJECT_STORE_BYTES):
            if self.train_base:
                with step("base") as facts:
                    self.write_base(self.train_base)
                    facts.update(figures(self.base))
            for stage in STAGES:
                run_stage(stage, self.config)
            if not self.data:  # the answers of a user's chats have no database to run in
                with step("quality") as facts:
                    facts.update(self.measure_quality())
            self.measure_speed()
        with step("report"):
            reporting.run(str(self.out))
        provenance.write(str(self.out), self.settings, self.inputs())

    def write_chats(self) -> None:
        """Generated chats -> chats/SPLIT.jsonl, each answer run once; the user's own lack only a contrast."""
        folder = self.out / "chats"
        num_chats = {"out_of_domain": self.size.num_out_of_domain}
        if not self.data:
            num_chats |= {"train": self.size.num_train, "test": self.size.num_test}
        settings = {"seed": SEED, "num_chats": num_chats}
        if provenance.is_complete(str(folder), settings, {}):
            return
        folder.mkdir(exist_ok=True)
        num_with_rows = 0
        for split in get_args(generator.Split):
            rows = generator.chats(split, num_chats.get(split, 0), SEED)
            num_with_rows += sum(bool(generator.execute(row, row["messages"][-1]["content"])) for row in rows)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            if rows:
                (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        provenance.write(
            str(folder), settings, {}, num_chats=sum(num_chats.values()), num_with_rows=num_with_rows
        )

    def own_chats(self) -> list[dict[str, Any]]:
        """The user's training chats, all of them; raises UserError at the first row that is none."""
        from medusa_ray import data

        whole = self.config.data.model_copy(update={"num_train": None, "out_of_domain": None})
        talks = ((chat.error, json.loads(chat.text)) for chat in data.chats(whole, "train"))
        return [{"messages": talk} for error, talk in talks if not error and isinstance(talk, list)]

    def write_base(self, size: str) -> None:
        from medusa_ray.demo.train_base import train_base

        num_samples = self.size.base_samples
        chats = self.own_chats() if self.data else generator.chats("train", num_samples, BASE_SEED)
        train_base(chats, self.base, size, num_samples=num_samples)

    def measure_quality(self) -> dict[str, Any]:
        """The base's replies to the held-out chats, run in sqlite -> evaluation/quality.json."""
        folder = self.config.artifact("evaluation")
        path, of = f"{folder}/quality.json", provenance.digest(folder)
        if not (Path(path).exists() and provenance.read_json(path)["evaluation"] == of):
            from medusa_ray.demo import quality

            prompts = {row["id"]: row for row in pq.read_table(f"{self.out}/prompts/test").to_pylist()}
            replies = pq.read_table(f"{folder}/replies.parquet").to_pylist()
            answers = [{"role": "assistant", "content": row["reference"]} for row in replies]
            chats = [
                {"messages": [*prompts[row["id"]]["messages"], answer]}
                for row, answer in zip(replies, answers, strict=True)
            ]
            scores = quality.score(chats, [row["reply"] for row in replies])
            provenance.write_json(path, {**scores, "evaluation": of})
        return {name: value for name, value in provenance.read_json(path).items() if name != "evaluation"}

    def measure_speed(self) -> None:
        """Serves both arms and sends them the same traffic, over whichever port is free.

        A benchmark knows its targets by their URLs alone, so what answered there is kept beside its results.
        """
        served = serve_config(self.out, self.base, self.port or free_port())
        traffic = traffic_config(self.out, self.base, served.http_options.port, self.size)
        answering = {
            name: provenance.digest(str(self.out / name)) for name in ("prompts", "heads", "evaluation")
        }
        key = provenance.key(traffic.model_dump(exclude={"targets"}), answering)
        folder = self.out / "bench"
        mark = folder / "served.json"
        if mark.exists() and provenance.read_json(str(mark))["key"] == key:
            return
        from medusa_ray import bench, serve
        from medusa_ray.demo import serve_paths

        shutil.rmtree(folder, ignore_errors=True)
        write_yaml(self.out / "serve.yaml", served, exclude_unset=True)  # Ray refuses a null in many places
        with step("serve") as facts:
            urls = serve.deploy(served)
            facts.update(urls)
        targets = {arm: TargetConfig(url=serve.direct_url(url), model=arm) for arm, url in urls.items()}
        traffic = traffic.model_copy(update={"targets": targets})
        write_yaml(self.out / "traffic.yaml", traffic)
        with step("bench") as facts:
            facts.update(figures(bench.run(traffic)))
            # What the way to a replica adds, which no arm can help.
            num_requests = min(20, self.size.num_requests)
            paths = serve_paths.compare(urls["baseline"], "baseline", num_requests)
            results = provenance.read_json(f"{folder}/bench.json")
            provenance.write_json(f"{folder}/bench.json", {**results, "serve_paths": paths})
        serve.shutdown()
        provenance.write_json(str(mark), {"key": key})


# ---------------------------------------------------------------------------------------------------- configs


def run_config(out: Path, base: str, data: str | None, size: Size) -> RunConfig:
    chats = out / "chats"
    raw = {
        "output": str(out),
        "model": {"base": base, "dtype": "float32", "device": "cpu"},
        "data": {
            "train": data or str(chats / "train.jsonl"),
            "test": None if data else str(chats / "test.jsonl"),
            "out_of_domain": str(chats / "out_of_domain.jsonl"),
            "num_train": size.num_train,
            "num_test": size.num_test,
            "max_prompt_tokens": 512,
        },
        "distill": {"num_actors": 2, "batch_size": 32, "max_new_tokens": 128, "seed": SEED},
        "heads": {"num_heads": 3, "num_layers": 1},
        "train": {
            "num_workers": 2,
            "epochs": size.epochs,
            "batch_size": 128,
            "warmup_steps": 20,
            "learning_rate": 2e-3,
            "dtype": "float32",
            "seed": SEED,
        },
        "evaluate": {"num_parity": size.num_parity, "num_speed": size.num_speed},
    }
    return parse(RunConfig, raw, "the demo's own run.yaml")


def serve_config(out: Path, base: str, port: int) -> ServeConfig:
    """Both arms of the comparison: one engine with heads and one without, everything else the same."""
    engine = {
        "base": base,
        "dtype": "float32",
        "device": "cpu",
        "max_total_tokens": 640,
        "threads": 1,
        "compile": "wait",
        "shares_prefixes": False,  # the benchmark sends each prompt many times, real traffic does not
    }
    heads = {"baseline": None, "medusa": str(out / "heads")}
    applications = [
        {
            "name": arm,
            "route_prefix": f"/{arm}",
            "import_path": "medusa_ray.serve:build_app",
            "args": {"model_id": arm, "heads": heads[arm], **engine},
        }
        for arm in ARMS
    ]
    raw = {"http_options": {"host": HOST, "port": port}, "applications": applications}
    return parse(ServeConfig, raw, "the demo's own serve.yaml")


def traffic_config(out: Path, base: str, port: int, size: Size) -> TrafficConfig:
    raw = {
        "output": str(out / "bench"),
        "prompts": str(out / "prompts" / "test"),
        "targets": {arm: {"url": f"http://{HOST}:{port}/{arm}", "model": arm} for arm in ARMS},
        "num_requests": size.num_requests,
        "num_warmup": 4,
        "rounds": size.rounds,
        "max_seconds": size.max_seconds,
    }
    return parse(TrafficConfig, raw, "the demo's own traffic.yaml")


def write_yaml(path: Path, config: Strict, exclude_unset: bool = False) -> None:
    raw = config.model_dump(exclude_unset=exclude_unset)
    path.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return probe.getsockname()[1]
