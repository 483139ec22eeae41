"""A run or serve file -> what it asks of a cluster. Reads its base's config.json and some of its chats."""

import math
from dataclasses import replace

from medusa_ray import parts
from medusa_ray.cli import estimate
from medusa_ray.config import (
    ROUTER,
    ApplicationConfig,
    ResilientConfig,
    RunConfig,
    ServeConfig,
    least_and_most,
)
from medusa_ray.data.sources import find_sources
from medusa_ray.doctor.facts import Bundle, Needs, Process
from medusa_ray.shards import TYPE, base_of

CHECKPOINTS = 4  # times heads/: weights, moments and the ones before


def of(config: RunConfig | ServeConfig, file: str, has_gpu: bool) -> Needs:
    """has_gpu: whether the cluster has one, which `device: auto` takes. Raises UserError for missing chats."""
    return of_run(config, file, has_gpu) if isinstance(config, RunConfig) else of_serve(config, file, has_gpu)


def of_run(run: RunConfig, file: str, has_gpu: bool) -> Needs:
    on_gpu = run.model.device == "cuda" or (has_gpu and run.model.device == "auto")
    device: dict[str, float] = {"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1}
    stages: dict[str, tuple[Bundle, ...]] = {}
    if run.distill.replies == "generate" and run.distill.engine == "own":
        share = {"GPU": run.distill.gpus_per_actor} if on_gpu else {}
        share |= _of_type(run.distill.accelerator_type)
        num = _least(run.distill.num_actors)
        stages["distill"] = (Bundle("distill.num_actors", device | share, num),)
    if run.hidden.mode == "compute":
        share = {"GPU": run.hidden.gpus_per_actor} if on_gpu else {}
        share |= _of_type(run.hidden.accelerator_type)
        stages["hidden"] = (Bundle("hidden.num_actors", device | share),)
    # Streaming takes a second CPU of each worker, but shares its GPU where there is no second one.
    num_workers = run.train.least_workers * (2 if run.hidden.mode == "stream" and not on_gpu else 1)
    of_train = device | _of_type(run.train.accelerator_type)
    stages["train"] = (Bundle("train.num_workers", of_train, num_workers),)
    stages["evaluate"] = (Bundle("evaluate", device),)
    sources = find_sources(run.data)
    return Needs(
        file=file,
        writes=(absolute(run.output),),
        inputs=tuple(absolute(source.files[0]) for split in sources.values() for source in split),
        bases=((base_of(run.model), run.model.revision),),
        bundles=stages,
        wants_gpu=run.model.device == "cuda",
        compiles=run.evaluate.compile and not on_gpu,
    )


def measured(run: RunConfig, needs: Needs, has_gpu: bool) -> Needs:
    """The same with bytes of memory and disk, as `medusa-ray plan` has them, where base and chats are in reach."""
    base = estimate.read_base(run.model.base, run.model.revision)
    if base is None:
        why = f"memory and disk are unknown: no Llama-shaped config.json of {run.model.base} in reach"
        return replace(needs, unknown=(*needs.unknown, why))
    on_gpu = run.model.device == "cuda" or (has_gpu and run.model.device == "auto")
    num_bytes = estimate.BYTES[run.model.dtype]
    weights = base.num_parameters * (0.5 if run.model.quantization == "4bit" else num_bytes)
    processes = [Process("a train worker", estimate.train_worker_bytes(base, run.heads, run.train), on_gpu)]
    if "distill" in needs.bundles:
        processes.append(Process("the base's weights in a distill actor", weights, on_gpu))
    found = estimate.samples(run, base)
    num_rows = int(sum(sample.num_chats for sample in found.values())) or None
    amount = estimate.count(run, min(filter(None, (num_rows, run.data.num_train)), default=None))
    heads = estimate.num_head_parameters(base, run.heads) * estimate.BYTES[run.train.dtype]
    if amount is None:
        why = f"disk is unknown: the chats of {' '.join(s.uri for s in run.data.train)} cannot be counted cheaply"
        return replace(needs, processes=tuple(processes), unknown=(*needs.unknown, why))
    per_state, top_k = base.hidden_size * num_bytes, run.hidden.top_k
    states = 0 if run.hidden.mode == "stream" else estimate.hidden_bytes(amount, per_state, top_k)
    return replace(
        needs,
        processes=tuple(processes),
        disk_bytes=states + 8 * amount.num_tokens + CHECKPOINTS * heads,
        is_disk_bound=not amount.is_counted,
    )


def of_serve(serve: ServeConfig, file: str, has_gpu: bool) -> Needs:
    """What its applications ask for together, each with as few replicas as it may have."""
    engines = [engine for app in serve.applications for engine in app.engines.values()]
    on_gpu = {id(e): e.device == "cuda" or (has_gpu and e.device == "auto") for e in engines}
    processes = []
    for engine in engines:
        if base := estimate.read_base(engine.base, None):
            num_bytes = base.num_parameters * estimate.BYTES[engine.dtype] / engine.tensor_parallel
            processes.append(
                Process(f"the base's weights of {engine.model_id}", num_bytes, on_gpu[id(engine)])
            )
    logs = [engine.traffic_log.uri for engine in engines if engine.traffic_log]
    folders = [folder for engine in engines for folder in (engine.heads,) if folder]
    return Needs(
        file=file,
        writes=tuple(dict.fromkeys(map(absolute, logs))),
        inputs=tuple(dict.fromkeys(absolute(f"{folder}/config.json") for folder in folders)),
        bases=tuple(dict.fromkeys((engine.base, None) for engine in engines)),
        bundles={"serve": tuple(b for app in serve.applications for b in _deployed(app))},
        processes=tuple(processes),
        wants_gpu=any(engine.device == "cuda" for engine in engines),
        compiles=any(engine.compile != "no" and not on_gpu[id(engine)] for engine in engines),
        http=(serve.http_options.host, serve.http_options.port)
        if serve.proxy_location != "Disabled"
        else None,
        proxies=serve.proxy_location,
    )


def _deployed(app: ApplicationConfig) -> list[Bundle]:
    """Bundles of the application's replicas: a CPU each, as Ray Serve has it, where the file says nothing."""
    overrides = {deployment.name: deployment for deployment in app.deployments}
    found = []
    for name in [*app.engines, *([ROUTER] if isinstance(app.args, ResilientConfig) else [])]:
        options, engine = overrides.get(name), app.engines.get(name)
        actor = options.ray_actor_options if options else None
        scaling = options.autoscaling_config if options else None
        num_replicas = options.num_replicas if options else None
        num = scaling.min_replicas if scaling else num_replicas if isinstance(num_replicas, int) else 1
        each: dict[str, float] = {"CPU": 1.0 if actor is None or actor.num_cpus is None else actor.num_cpus}
        if actor is not None:
            each |= {"GPU": actor.num_gpus or 0.0, **(actor.resources or {})}
            each |= _of_type(actor.accelerator_type)
        num_shards = engine.tensor_parallel if engine else 1
        bundles: list[dict[str, float]] = (options.placement_group_bundles if options else None) or []
        if not bundles and engine and num_shards > 1:
            bundles = [{"CPU": 1, "GPU": 1} if engine.device == "cuda" else {"CPU": 1}] * num_shards
        what = f"{app.name}/{name}"
        found += [
            Bundle(what, {k: v for k, v in bundle.items() if v}, num) for bundle in bundles or [each] if num
        ]
    return found


def _of_type(accelerator_type: str | None) -> dict[str, float]:
    """What Ray counts of a node's type of GPU, and takes a part of for each that asks for the type."""
    return {f"{TYPE}{accelerator_type}": 0.001} if accelerator_type else {}


def absolute(uri: str) -> str:
    """A path for local files, a URI for others; the same for a process that runs elsewhere."""
    return parts.absolute(uri).removeprefix("file://")


def _least(num_actors: int | str) -> int:
    """As many as have to start: of a plain number those that fit do."""
    least, most = least_and_most(num_actors)
    return 1 if least == most or math.isinf(most) else least
