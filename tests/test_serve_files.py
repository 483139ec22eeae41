"""Serve files: what `validate` refuses, what a file leaves out, and the files that ship, for Kubernetes too."""

import json
import math
import re
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from packaging.requirements import Requirement

from medusa_ray import config, serve
from medusa_ray.config import ServeConfig, Strict, UserError
from medusa_ray.demo import pipeline
from medusa_ray.serve.cluster import application
from medusa_ray.serve.metrics import Metrics
from medusa_ray.serve.server import Server

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "serve_configs"
SERVE_FILES = [
    file for file in sorted(CONFIGS.glob("*.yaml")) if not file.stem.startswith(("traffic_", "kuberay_"))
]
IMPORT_PATH = "medusa_ray.serve:build_app"
KUBERAY = [*CONFIGS.glob("kuberay_*.yaml"), *(REPOSITORY / "train_configs").glob("kuberay_*.yaml")]


def named(file: Path) -> str:
    return file.stem


def file_of(
    *, args: Any = (), engine: Any = None, app: Any = (), http: Any = (), top: Any = ()
) -> dict[str, Any]:
    """A serve file of one application, with these keys more or others."""
    one = {
        "name": "medusa",
        "import_path": IMPORT_PATH,
        "args": {"model_id": "m", "base": "b", **dict(args)},
        **dict(app),
    }
    if engine is not None:
        one["deployments"] = [{"name": "Engine", **engine}]
    return {
        "http_options": {"host": "127.0.0.1", "request_timeout_s": 600, **dict(http)},
        "applications": [one],
        **dict(top),
    }


def parsed(**keys: Any) -> ServeConfig:
    return config.parse(ServeConfig, file_of(**keys), "x.yaml")


# -------------------------------------------------------------------------------------------- keys of Ray Serve


def test_the_keys_of_a_serve_file_are_ray_serves() -> None:
    """A Ray that adds a key, or drops one, fails here: it is to be taken, or refused with a reason."""
    from ray.runtime_env import RuntimeEnv
    from ray.serve import config as ray_config
    from ray.serve import schema

    pairs: list[tuple[type[Strict], Any]] = [
        (config.ServeConfig, schema.ServeDeploySchema),
        (config.HttpOptions, schema.HTTPOptionsSchema),
        (config.ControllerOptions, schema.ControllerOptions),
        (config.LoggingConfig, schema.LoggingConfig),
        (config.TracingConfig, schema.TracingConfig),
        (config.ApplicationConfig, schema.ServeApplicationSchema),
        (config.DeploymentConfig, schema.DeploymentSchema),
        (config.RayActorOptions, schema.RayActorOptionsSchema),
        (config.AutoscalingConfig, ray_config.AutoscalingConfig),
        (config.AutoscalingPolicy, ray_config.AutoscalingPolicy),
        (config.BackpressureConfig, ray_config.BackpressureConfig),
        (config.RequestRouterConfig, ray_config.RequestRouterConfig),
    ]
    for ours, theirs in pairs:
        known = set(ours.model_fields) | set(ours.refused)
        assert known == set(theirs.model_fields), ours.__name__
        assert not set(ours.model_fields) & set(ours.refused)
    public = {name for name in RuntimeEnv.known_fields if not name.startswith("_")}
    assert set(config.RuntimeEnv.model_fields) == public
    with pytest.raises(ValueError, match="env_vars"):
        schema.ControllerOptions(runtime_env={"pip": []})
    assert set(config.ControllerEnv.model_fields) == {"env_vars"}


@pytest.mark.parametrize(
    ("keys", "path", "right"),
    [
        ({"top": {"proxy_locaton": "HeadOnly"}}, "proxy_locaton", "proxy_location"),
        ({"top": {"request_timeout_s": 5}}, "request_timeout_s", "http_options.request_timeout_s"),
        ({"http": {"request_timeout": 5}}, "http_options.request_timeout", "http_options.request_timeout_s"),
        ({"app": {"route": "/x"}}, "applications.0.route", "applications.0.route_prefix"),
        ({"app": {"runtime_env": {"env_var": {}}}}, "applications.0.runtime_env.env_var", "{}env_vars"),
        (
            {"app": {"logging_config": {"level": "INFO"}}},
            "applications.0.logging_config.level",
            "{}log_level",
        ),
        (
            {"top": {"logging_config": {"encodin": "JSON"}}},
            "logging_config.encodin",
            "logging_config.encoding",
        ),
        ({"top": {"tracing_config": {"ratio": 1}}}, "tracing_config.ratio", "tracing_config.sampling_ratio"),
        ({"engine": {"max_ongoing_request": 5}}, "applications.0.deployments.0.max_ongoing_request", "{}s"),
        (
            {"engine": {"ray_actor_options": {"num_gpu": 1}}},
            "applications.0.deployments.0.ray_actor_options.num_gpu",
            "{}num_gpus",
        ),
        (
            {"engine": {"autoscaling_config": {"target_num_ongoing_requests": 1}}},
            "applications.0.deployments.0.autoscaling_config.target_num_ongoing_requests",
            "{}target_ongoing_requests",
        ),
        (
            {"engine": {"autoscaling_config": {"policy": {"policy_function": "a:b", "kwargs": {}}}}},
            "applications.0.deployments.0.autoscaling_config.policy.kwargs",
            "{}policy_kwargs",
        ),
        (
            {"engine": {"backpressure_config": {"retry_after": 1}}},
            "applications.0.deployments.0.backpressure_config.retry_after",
            "{}retry_after_s",
        ),
    ],
)
def test_a_key_that_ray_serve_would_drop_is_refused_with_the_nearest_right_one(
    keys: dict[str, Any], path: str, right: str
) -> None:
    right = f"{path}s" if right == "{}s" else right.format(f"{path.rpartition('.')[0]}.")
    with pytest.raises(UserError) as caught:
        parsed(**keys)
    assert f"  {path} is not a key; did you mean {right}?" in str(caught.value).splitlines()


def test_a_key_of_ray_serves_that_does_not_fit_here_is_refused_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"grpc_options is a key of Ray Serve's .*over HTTP alone"):
        parsed(top={"grpc_options": {"port": 9000}})
    with pytest.raises(
        UserError, match=r"applications\.0\.port is a key of Ray Serve's .*http_options\.port"
    ):
        parsed(app={"port": 9000})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"app": {"route_prefix": "medusa"}}, r"route_prefix 'medusa'; expected"),
        ({"app": {"route_prefix": "/medusa/"}}, r"route_prefix '/medusa/'; expected"),
        ({"app": {"runtime_env": {"working_dir": "./here"}}}, r"the folder './here' of this machine"),
        ({"app": {"deployments": [{"name": "Engin"}]}}, r"a deployment named 'Engin'; it has Engine"),
        ({"app": {"deployments": [{"name": "Engine"}] * 2}}, r"overrides the deployment Engine twice"),
        ({"engine": {"num_replicas": 0}}, r"num_replicas is 0"),
        ({"engine": {"max_queued_requests": 0}}, r"max_queued_requests is 0"),
        ({"engine": {"num_replicas": 2, "autoscaling_config": {}}}, r"num_replicas 2 and autoscaling_config"),
        (
            {"engine": {"autoscaling_config": {"min_replicas": 3}}},
            r"min_replicas 3, .* max_replicas 1; expected",
        ),
        (
            {"engine": {"autoscaling_config": {}}, "app": {"external_scaler_enabled": True}},
            r"external_scaler_enabled and autoscales Engine",
        ),
        ({"engine": {"autoscaling_config": {"target_ongoing_requests": 128}}}, r"never .* at most"),
        (
            {"engine": {"max_ongoing_requests": 8, "autoscaling_config": {"target_ongoing_requests": 9}}},
            r"never start another replica: target_ongoing_requests is 9, but a replica has 8 requests at most",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parsed(**keys)


def test_a_target_below_what_a_replica_takes_can_fire() -> None:
    parsed(engine={"autoscaling_config": {"target_ongoing_requests": 127}})
    parsed(
        engine={"autoscaling_config": {"target_ongoing_requests": 900, "policy": {"policy_function": "a:b"}}}
    )


@pytest.mark.parametrize(
    ("keys", "note"),
    [
        ({"http": {"host": "0.0.0.0"}}, "medusa let everybody in who reaches it"),
        ({"args": {"device": "cuda"}}, "ask for no num_gpus"),
        ({"engine": {"autoscaling_config": {"max_replicas": 2}}}, "`serve deploy` Ray's 2"),
        ({"engine": {"num_replicas": "auto"}}, "`serve deploy` Ray's 2"),
        ({"http": {"request_timeout_s": 900}}, "longer than a replica that ends waits for it, 600 s"),
        ({"http": {"request_timeout_s": None}}, "longer than a replica that ends waits for it, 600 s"),
        (
            {"engine": {"graceful_shutdown_timeout_s": 20}},
            "longer than a replica that ends waits for it, 20 s",
        ),
        ({"top": {"http_options": {"request_timeout_s": 600}}}, "http_options.host is not set"),
        ({"top": {"http_options": {"host": "127.0.0.1"}}}, "http_options.request_timeout_s is not set"),
        (
            {"top": {"applications": [{"name": "a", "args": {"model_id": "m", "base": "b"}}]}},
            "no import_path",
        ),
    ],
)
def test_what_is_hardly_meant_is_noted(keys: dict[str, Any], note: str) -> None:
    assert config.notes(parsed()) == []
    (found,) = config.notes(parsed(**keys))
    assert note in found


def test_what_is_meant_is_not_noted() -> None:
    assert config.notes(parsed(http={"host": "0.0.0.0"}, args={"api_key_env": "KEY"})) == []
    assert config.notes(parsed(args={"device": "cuda"}, engine={"ray_actor_options": {"num_gpus": 1}})) == []


def test_an_anchor_is_read_as_yaml_has_it_and_a_key_that_stands_twice_is_still_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.yaml"
    text = "a: &engine {x: 1, y: 2}\nb: {<<: *engine, y: 3}\n"
    path.write_text(text)
    assert config.read(path)["b"] == {"x": 1, "y": 3}
    path.write_text(text.replace("y: 3", "y: 3, y: 4"))
    with pytest.raises(UserError, match="'y' stands here twice"):
        config.read(path)
    path.write_text(text.replace("*engine", "*engin"))
    with pytest.raises(UserError, match="undefined alias 'engin'"):
        config.read(path)


@pytest.mark.parametrize("text", ["{}", "services: {web: {image: x}}", "- a"])
def test_a_file_of_something_else_is_refused_as_one(text: str, tmp_path: Path) -> None:
    path = tmp_path / "compose.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"compose\.yaml (has the keys .*; a run has|holds list)"):
        config.parse_any(config.read(path), str(path))


# -------------------------------------------------------------------------------------------- what a file leaves out


def options_of(served: ServeConfig) -> dict[str, Any]:
    deployment = application(served.applications[0])._bound_deployment
    return deployment._deployment_config.model_dump()


def test_ray_serves_limits_stand_behind_the_engines_own() -> None:
    options = options_of(parsed(args={"max_concurrent_requests": 50}))
    assert (options["max_ongoing_requests"], options["max_queued_requests"]) == (100, 100)
    assert options["backpressure_config"] == {"status_code": 429, "retry_after_s": 1}
    changed = options_of(parsed(engine={"max_ongoing_requests": 7}))
    assert (changed["max_ongoing_requests"], changed["max_queued_requests"]) == (7, 256)


def test_a_replica_that_ends_waits_as_long_as_a_reply_may_take() -> None:
    options = options_of(parsed())
    assert options["graceful_shutdown_timeout_s"] > config.HttpOptions().request_timeout_s
    assert (options["health_check_period_s"], options["health_check_timeout_s"]) == (3, 30)


@pytest.mark.parametrize("engine", [{"num_replicas": "auto"}, {"autoscaling_config": {"max_replicas": 3}}])
def test_the_target_of_autoscaling_is_the_engines_batch_when_none_is_given(engine: dict[str, Any]) -> None:
    scaling = options_of(parsed(args={"max_batch_size": 24}, engine=engine))["autoscaling_config"]
    assert scaling["target_ongoing_requests"] == 24
    assert scaling["max_replicas"] == engine.get("autoscaling_config", {"max_replicas": 100})["max_replicas"]
    given = {"autoscaling_config": {"max_replicas": 3, "target_ongoing_requests": 5}}
    assert options_of(parsed(engine=given))["autoscaling_config"]["target_ongoing_requests"] == 5


def test_the_demos_own_file_is_one_that_ray_serve_takes(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    path = tmp_path / "serve.yaml"
    pipeline.write_yaml(path, pipeline.serve_config(tmp_path, "base", 8000), exclude_unset=True)
    raw = config.read(path)
    assert ServeDeploySchema.model_validate(raw).model_dump(exclude_unset=True, mode="json") == raw


# -------------------------------------------------------------------------------------------- the files that ship


def leaves(raw: Any, prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    inner = raw.items() if isinstance(raw, dict) else enumerate(raw) if isinstance(raw, list) else None
    if inner is None:
        return {prefix.rstrip("."): raw}
    return {path: value for key, below in inner for path, value in leaves(below, f"{prefix}{key}.").items()}


@pytest.mark.parametrize("baseline", sorted(CONFIGS.glob("baseline_*.yaml")), ids=named)
def test_the_two_arms_differ_by_name_and_heads_alone(baseline: Path) -> None:
    medusa = config.read(CONFIGS / baseline.name.replace("baseline_", "medusa_"))
    ours, theirs = leaves(medusa), leaves(config.read(baseline))
    different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert different <= {"applications.0.name", "applications.0.args.model_id", "applications.0.args.heads"}
    assert {"applications.0.name", "applications.0.args.heads"} <= different


@pytest.mark.parametrize("compare", sorted(CONFIGS.glob("compare_*.yaml")), ids=named)
def test_a_comparison_deploys_the_engines_of_the_two_arms(compare: Path) -> None:
    apps = {app["name"]: app for app in config.read(compare)["applications"]}
    assert set(apps) == {"baseline", "medusa"}
    for name, app in apps.items():
        (alone,) = config.read(CONFIGS / compare.name.replace("compare", name))["applications"]
        assert app["args"] == alone["args"]
        resources = [one.get("deployments", [{}])[0].get("ray_actor_options") for one in (app, alone)]
        assert resources[0] == resources[1]
        assert app["route_prefix"] == f"/{name}"


@pytest.mark.parametrize("file", SERVE_FILES, ids=named)
def test_a_file_says_what_serve_deploy_has_another_default_for(file: Path) -> None:
    """`serve deploy` would listen on every interface, for requests of any length."""
    assert config.notes(config.load(ServeConfig, file)) == []
    raw = config.read(file)
    assert raw["http_options"] == {"host": "127.0.0.1", "port": 8000, "request_timeout_s": 600}
    assert "proxy_location" in raw


# -------------------------------------------------------------------------------------------- Kubernetes


def unknown_fields(value: Any, kind: str, types: dict[str, dict[str, str]], path: str = "") -> list[str]:
    """Dotted keys of a Kubernetes object that its API does not have, and those that hold a list or an object where it
    has the other one."""
    if kind.endswith("[]"):
        if not isinstance(value, list):
            return [path]
        return [bad for one in value for bad in unknown_fields(one, kind.removesuffix("[]"), types, path)]
    if kind not in types:
        return []
    if not isinstance(value, dict):
        return [path]
    found = []
    for key, inner in value.items():
        where = f"{path}.{key}".lstrip(".")
        found += unknown_fields(inner, types[kind][key], types, where) if key in types[kind] else [where]
    return found


def published() -> dict[str, dict[str, str]]:
    types = json.loads((REPOSITORY / "tests" / "data" / "kuberay_fields.json").read_text())["types"]
    assert isinstance(types, dict)
    return types


@pytest.mark.parametrize("file", KUBERAY, ids=named)
def test_kuberay_knows_every_field_of_its_files(file: Path) -> None:
    raw = config.read(file)
    assert raw["apiVersion"] == "ray.io/v1"
    assert unknown_fields(raw, raw["kind"], published()) == []


def test_a_misspelt_field_of_kuberay_is_found() -> None:
    raw = config.read(CONFIGS / "kuberay_medusa_llama31_8b.yaml")
    cluster = raw["spec"]["rayClusterConfig"]
    cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["volumeMount"] = []
    cluster["authOption"] = cluster.pop("authOptions")
    cluster["headGroupSpec"]["template"]["spec"]["containers"] = {}
    assert unknown_fields(raw, "RayService", published()) == [
        "spec.rayClusterConfig.headGroupSpec.template.spec.containers",
        "spec.rayClusterConfig.workerGroupSpecs.template.spec.containers.volumeMount",
        "spec.rayClusterConfig.authOption",
    ]


def test_the_rayservice_serves_the_plain_file() -> None:
    raw = config.read(CONFIGS / "kuberay_medusa_llama31_8b.yaml")
    embedded = yaml.safe_load(raw["spec"]["serveConfigV2"])
    assert embedded["http_options"]["host"] == "0.0.0.0"
    embedded["http_options"]["host"] = "127.0.0.1"
    (app,) = embedded["applications"]
    key = app["args"].pop("api_key_env")
    assert embedded == config.read(CONFIGS / "medusa_llama31_8b_text_to_sql.yaml")

    spec = raw["spec"]
    cluster = spec["rayClusterConfig"]
    (group,) = cluster["workerGroupSpecs"]
    (options,) = app["deployments"]
    pods = [cluster["headGroupSpec"]["template"]["spec"], group["template"]["spec"]]
    names = [[one["name"] for one in pod["containers"][0]["env"]] for pod in pods]
    assert names[0] == names[1]
    assert {key, "RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"} <= set(names[0])
    num_replicas = options["autoscaling_config"]["max_replicas"]
    assert group["maxReplicas"] == num_replicas + math.ceil(num_replicas * options["max_surge_percent"] / 100)
    limits = pods[1]["containers"][0]["resources"]["limits"]
    assert float(limits["nvidia.com/gpu"]) == options["ray_actor_options"]["num_gpus"]
    assert float(limits["cpu"]) >= options["ray_actor_options"]["num_cpus"]
    longest_s = embedded["http_options"]["request_timeout_s"]
    assert spec["rayClusterDeletionDelaySeconds"] >= longest_s
    assert pods[1]["terminationGracePeriodSeconds"] >= longest_s


def test_the_rayjob_runs_a_file_that_the_image_has() -> None:
    raw = config.read(REPOSITORY / "train_configs" / "kuberay_llama31_8b_text_to_sql.yaml")
    words = raw["spec"]["entrypoint"].split()
    assert words[:2] == ["medusa-ray", "run"]
    file = REPOSITORY / Path(words[2]).relative_to("/home/ray")
    config.load(config.RunConfig, file, words[3:])
    mounts = raw["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0][
        "volumeMounts"
    ]
    assert any(words[3].startswith(f"output={mount['mountPath']}/") for mount in mounts)


@pytest.mark.parametrize("file", KUBERAY, ids=named)
def test_a_ray_cluster_is_for_its_token_and_for_no_root(file: Path) -> None:
    spec = config.read(file)["spec"]
    cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in group["template"]["spec"]["containers"]:
            secrets = {
                one["name"]: one for one in container["env"] if re.search("KEY|TOKEN|PASS", one["name"])
            }
            assert all("value" not in one for one in secrets.values())
            assert "HF_TOKEN" in secrets


def test_the_image_has_the_versions_that_the_project_asks_for() -> None:
    text = (CONFIGS / "Containerfile").read_text()
    (ray,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py311-gpu$", text, re.MULTILINE)
    pins = dict(re.findall(r"\b([\w-]+)==([\d.]+)", text))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    asked = {(one := Requirement(line)).name: one.specifier for line in project["dependencies"]}
    for name, version in {**pins, "ray": ray}.items():
        assert asked[name].contains(version), name
    assert {"torch", "transformers", "deepspeed", "datasets"} <= set(pins)
    assert re.findall(r"^USER (\w+)$", text, re.MULTILINE) == ["ray"]
    copied = re.findall(r"^COPY --chown=1000:100 (.+) \S+$", text, re.MULTILINE)
    assert all((REPOSITORY / name).exists() for names in copied for name in names.split())
    for file in KUBERAY:
        spec = config.read(file)["spec"]
        assert (spec.get("rayClusterConfig") or spec["rayClusterSpec"])["rayVersion"] == ray
        assert f"medusa-ray:{project['version']}" in file.read_text()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"kind": "RayCluster"}, r"kind is 'RayCluster'; expected RayService or RayJob"),
        ({"kind": "RayService", "spec": {}}, r"spec\.serveConfigV2 is None; expected the text"),
        (
            {"kind": "RayService", "spec": {"serveConfigV2": {"applications": []}}},
            r"expected the text of a YAML file",
        ),
        (
            {"kind": "RayService", "spec": {"serveConfigV2": "a: [1"}},
            r"x\.yaml: spec\.serveConfigV2 is not YAML",
        ),
        (
            {"kind": "RayService", "spec": {"serveConfigV2": "application: []"}},
            r"x\.yaml: spec\.serveConfigV2:\n  applications is missing.*\n  application is not a key; did you mean",
        ),
        (
            {"kind": "RayJob", "spec": {"runtimeEnvYAML": "pips: []"}},
            r"pips is not a key; did you mean pip\?",
        ),
    ],
)
def test_the_part_of_a_kuberay_file_that_is_ours_is_checked(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.parse_any({"apiVersion": "ray.io/v1", **raw}, "x.yaml")


# -------------------------------------------------------------------------------------------- Grafana


def dashboard() -> dict[str, Any]:
    raw = json.loads((CONFIGS / "grafana_dashboard.json").read_text())
    assert isinstance(raw, dict)
    return raw


def test_every_metric_of_the_dashboard_is_one_that_a_server_exports(tiny_base: Path) -> None:
    """A panel of a metric that was renamed stays empty, which looks like a server without traffic."""
    args = config.EngineConfig(model_id="m", base=str(tiny_base), dtype="float32", device="cpu", compile="no")
    suffixes = {
        "counter": ["_total"],
        "histogram": ["_bucket", "_sum", "_count"],
        "summary": ["_sum", "_count"],
    }
    exported = {
        family.name + suffix
        for family in Metrics(Server.load(args)).collect()
        for suffix in suffixes.get(family.type, [""])
    }
    expressions = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", [])]
    variables = {variable["name"]: variable for variable in dashboard()["templating"]["list"]}
    expressions.append(variables["model"]["query"]["query"])
    used = {name for expression in expressions for name in re.findall(r"\$\{prefix\}_\w+", expression)}
    assert {name.replace("${prefix}", "medusa_ray") for name in used} <= exported
    assert [option["value"] for option in variables["prefix"]["options"]] == ["ray_medusa_ray", "medusa_ray"]
    assert not re.findall(r"(?<!\w)medusa_ray_", "".join(expressions))  # each by the prefix that is chosen
    for part in (
        "time_to_first_token",
        "inter_token",
        "waiting",
        "per_pos",
        "tree_nodes",
        "failure",
        "kv_cache",
    ):
        assert any(part in name for name in used), part


def test_the_panels_of_the_dashboard_have_ids_targets_and_a_place_of_their_own() -> None:
    board = dashboard()
    panels = board["panels"]
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(board)
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies on {taken[x, y]}"
                taken[x, y] = panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0
        for target in panel["targets"]:
            assert target["expr"].count("(") == target["expr"].count(")")
            assert target["expr"].count("{") == target["expr"].count("}")


# -------------------------------------------------------------------------------------------- with Ray


@pytest.fixture(scope="module")
def url(ray_cluster: None, tiny_base: Path) -> Iterator[str]:
    """An application that Ray Serve itself builds from a file, as `serve deploy` has it do."""
    from ray.serve.schema import ServeDeploySchema

    args = {
        "base": str(tiny_base),
        "dtype": "float32",
        "device": "cpu",
        "compile": "no",
        "max_total_tokens": 500,
    }
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 8}
    raw = file_of(
        args={**args, "max_batch_size": 8},
        engine={"num_replicas": "auto", "autoscaling_config": scaling},
        http={"port": serve.free_port(), "request_timeout_s": 300},
    )
    assert config.notes(config.parse(ServeConfig, raw, "x.yaml")) == []
    ray.serve.start(raw.get("proxy_location", "HeadOnly"), raw["http_options"])
    client().deploy_apps(ServeDeploySchema.model_validate(raw))
    deadline_s = time.monotonic() + 200
    while (app := ray.serve.status().applications.get("medusa")) is None or app.status != "RUNNING":
        assert app is None or app.status == "DEPLOYING", app.message
        assert time.monotonic() < deadline_s, app
        time.sleep(0.1)
    url = f"http://127.0.0.1:{raw['http_options']['port']}"
    serve.wait_for_route(f"{url}/health", deadline_s)
    yield url
    serve.shutdown()
    ray.serve.shutdown()


def client() -> Any:
    """Ray Serve's own, which the dashboard hands files to."""
    from ray.serve.context import _get_global_client

    return _get_global_client()


@pytest.mark.ray
def test_serve_deploy_runs_a_file_with_all_that_it_leaves_out(url: str) -> None:
    """The file overrides some options of the deployment; those that the application sets must outlive that."""
    details = client().get_serve_details()
    assert details["http_options"]["request_timeout_s"] == 300
    options = details["applications"]["medusa"]["deployments"]["Engine"]["deployment_config"]
    assert (options["max_ongoing_requests"], options["max_queued_requests"]) == (256, 256)
    assert options["backpressure_config"] == {"status_code": 429, "retry_after_s": 1}
    assert (options["health_check_period_s"], options["health_check_timeout_s"]) == (3, 30)
    assert options["graceful_shutdown_timeout_s"] == 630
    scaling = options["autoscaling_config"]
    assert (scaling["max_replicas"], scaling["target_ongoing_requests"]) == (2, 8)


@pytest.mark.ray
def test_a_replica_that_ends_finishes_the_reply_that_it_sends(url: str) -> None:
    """The last test of this application."""
    body = {
        "model": "m",
        "prompt": "SELECT",
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": 400,
        "stream": True,
    }
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()
        first = next(lines)
        ray.serve.delete("medusa", _blocking=False)
        events = [line for line in (first, *lines) if line]
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    deadline_s = time.monotonic() + 60
    while ray.serve.status().applications:  # it does not wait for its 630 s then
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
