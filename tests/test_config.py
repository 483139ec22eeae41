"""Configs: what is refused, and whether the message helps. A key that is silently ignored costs a GPU day."""

import math
from pathlib import Path
from typing import Any

import pytest

from medusa_ray import config
from medusa_ray.config import RunConfig, ServeConfig, TrafficConfig, UserError

RUN = """\
output: runs/a
model: {base: some/model}
data: {train: chats.jsonl}
"""
SERVE = """\
applications:
  - name: medusa
    route_prefix: /medusa
    args: {model_id: medusa, base: some/model}
    deployments: [{name: Engine, num_replicas: auto, autoscaling_config: {max_replicas: 2}}]
"""
TRAFFIC = """\
output: bench
prompts: runs/a/prompts/test
targets:
  medusa: {url: "http://127.0.0.1:8000", model: medusa}
"""
TEXTS = {RunConfig: RUN, ServeConfig: SERVE, TrafficConfig: TRAFFIC}

# Right keys and how people miss them: swapped letters, lost letters, other projects' names for them.
MISSPELT = [
    (RunConfig, "train.learning_rate", "train.lerning_rate"),
    (RunConfig, "train.learning_rate", "train.learning_rat"),
    (RunConfig, "train.learning_rate", "lerning_rate"),
    (RunConfig, "train.epochs", "train.num_epochs"),
    (RunConfig, "train.epochs", "train.epoch"),
    (RunConfig, "train.batch_size", "train.batchsize"),
    (RunConfig, "train.warmup_steps", "train.warm_up_steps"),
    (RunConfig, "train.warmup_steps", "train.warmup_step"),
    (RunConfig, "train.weight_decay", "train.weight_decy"),
    (RunConfig, "train.zero_stage", "train.zero"),
    (RunConfig, "train.gradient_accumulation_steps", "train.gradient_acumulation_steps"),
    (RunConfig, "train.num_workers", "train.workers"),
    (RunConfig, "train.max_grad_norm", "train.grad_norm"),
    (RunConfig, "heads.num_heads", "heads.heads"),
    (RunConfig, "heads.num_heads", "heads.medusa_heads"),
    (RunConfig, "heads.num_layers", "heads.layers"),
    (RunConfig, "heads.layout", "heads.lay_out"),
    (RunConfig, "data.train", "data.trian"),
    (RunConfig, "data.out_of_domain", "data.out_of_domian"),
    (RunConfig, "data.max_prompt_tokens", "data.max_prompt_length"),
    (RunConfig, "distill.temperature", "distill.temprature"),
    (RunConfig, "distill.max_new_tokens", "distill.max_tokens"),
    (RunConfig, "evaluate.tree_nodes", "evaluate.nodes"),
    (RunConfig, "model.dtype", "model.dtyp"),
    (RunConfig, "model.revision", "model.revison"),
    (RunConfig, "evaluate", "evaluation"),
    (TrafficConfig, "num_requests", "num_request"),
    (TrafficConfig, "max_seconds", "max_second"),
    (TrafficConfig, "targets", "target"),
    (TrafficConfig, "temperature", "temprature"),
]


def write(folder: Path, text: str) -> str:
    (folder / "file.yaml").write_text(text)
    return str(folder / "file.yaml")


@pytest.mark.parametrize(("kind", "right", "wrong"), MISSPELT)
def test_a_misspelt_key_is_refused_and_the_right_one_named(
    kind: Any, right: str, wrong: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        config.load(kind, write(tmp_path, TEXTS[kind]), [f"{wrong}=1"])
    assert f"{wrong} is not a key; did you mean {right}?" in str(caught.value)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("applications.0.args.heads", "head: x"),
        ("applications.0.args.max_batch_size", "max_batchsize: 3"),
        ("applications.0.args.model_id", "model: x"),
    ],
)
def test_a_misspelt_key_deep_in_a_list_is_named_with_its_place(
    right: str, wrong: str, tmp_path: Path
) -> None:
    text = SERVE.replace("model_id: medusa", f"model_id: medusa, {wrong}")
    with pytest.raises(UserError) as caught:
        config.load(ServeConfig, write(tmp_path, text))
    assert f"applications.0.args.{wrong.split(':')[0]} is not a key; did you mean {right}?" in str(
        caught.value
    )


def test_what_ray_serve_would_ignore_is_refused(tmp_path: Path) -> None:
    """DeploymentSchema takes max_queued_request and http_options takes prot without a word."""
    text = SERVE.replace("max_replicas: 2", "target_ongoing_request: 2").replace(
        "num_replicas", "num_replica"
    )
    with pytest.raises(UserError) as caught:
        config.load(ServeConfig, write(tmp_path, "http_options: {prot: 9}\n" + text))
    for right in (
        "http_options.port",
        "deployments.0.num_replicas",
        "autoscaling_config.target_ongoing_requests",
    ):
        assert f"did you mean {'' if right.startswith('http') else 'applications.0.'}" in str(caught.value)
        assert right in str(caught.value)


def test_a_key_under_a_name_of_the_users_is_found(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"targets\.medusa\.ulr is not a key; did you mean targets\.medusa\.url\?"
    ):
        config.load(TrafficConfig, write(tmp_path, TRAFFIC.replace("url:", "ulr:")))


def test_all_problems_of_a_file_come_at_once(tmp_path: Path) -> None:
    text = RUN + "train: {epochs: -1, lr: 3}\nheads: {num_heads: many}\n"
    with pytest.raises(UserError) as caught:
        config.load(RunConfig, write(tmp_path, text))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all(
        any(key in line for line in lines)
        for key in ("train.epochs is -1", "train.lr", "heads.num_heads is 'many'")
    )


def test_the_branches_of_a_union_do_not_show_in_a_key(tmp_path: Path) -> None:
    text = SERVE.replace("model_id: medusa", "model_id: medusa, tree: 3")
    with pytest.raises(UserError) as caught:
        config.load(ServeConfig, write(tmp_path, text))
    assert all(
        line.startswith("  applications.0.args.tree is 3: ") for line in str(caught.value).splitlines()[1:]
    )


def test_a_flag_of_the_original_script_is_answered_with_the_key_of_today(tmp_path: Path) -> None:
    for flag in ("--medusa_num_heads=3", "--medusa_num_heads"):
        with pytest.raises(UserError, match=r"heads\.num_heads"):
            config.load(RunConfig, write(tmp_path, RUN), [flag])
    with pytest.raises(UserError, match=r"model\.base"):
        config.load(RunConfig, write(tmp_path, RUN + "model_name_or_path: x\n"))


def test_every_key_that_answers_an_old_flag_exists() -> None:
    assert set(config.LEGACY_FLAGS.values()) <= set(config._dotted(RunConfig))


def test_an_override_replaces_the_files_value_and_is_checked_like_it(tmp_path: Path) -> None:
    path = write(tmp_path, RUN + "train: {epochs: 4, seed: 7}\n")
    changed = config.load(
        RunConfig, path, ["train.epochs=2", "train.learning_rate=1e-3", "distill.batch_size=8"]
    )
    assert (changed.train.epochs, changed.train.seed) == (2, 7)
    assert (changed.train.learning_rate, changed.distill.batch_size) == (1e-3, 8)
    with pytest.raises(UserError, match=r"train\.epochs is 0"):
        config.load(RunConfig, path, ["train.epochs=0"])


@pytest.mark.parametrize("override", ["train.epochs", "output.x=1", "train.epochs=[1"])
def test_an_override_that_is_none_is_refused_by_name(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        config.load(RunConfig, write(tmp_path, RUN), [override])
    assert override.split("=")[0] in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "", "a: [1", "a: b: c"])
def test_a_file_that_is_no_mapping_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file\.yaml"):
        config.load(RunConfig, write(tmp_path, text))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """YAML would keep the second one and drop the first without a word."""
    with pytest.raises(UserError, match="'output' stands here twice"):
        config.load(RunConfig, write(tmp_path, RUN + "output: runs/b\n"))


@pytest.mark.parametrize("uri", ["missing.yaml", ".", "nowhere://x.yaml"])
def test_a_file_that_cannot_be_read_is_refused_by_name(uri: str) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        config.load(RunConfig, uri)


@pytest.mark.parametrize("kind", TEXTS)
def test_the_kind_of_a_file_is_known_by_its_keys_even_when_one_is_misspelt(kind: Any, tmp_path: Path) -> None:
    raw = config.read(write(tmp_path, TEXTS[kind]))
    assert config.kind_of(raw) is kind
    first = next(iter(raw))
    raw[first[:-1]] = raw.pop(first)
    assert config.kind_of(raw) is kind


def test_given_replies_cannot_be_captured(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hidden\.mode"):
        config.load(RunConfig, write(tmp_path, RUN), ["distill.replies=given"])
    assert config.load(RunConfig, write(tmp_path, RUN), ["distill.replies=given", "hidden.mode=compute"])


def test_states_of_prompts_cannot_be_captured(tmp_path: Path) -> None:
    """Where every token is a label; distillation passes through the states of replies alone."""
    with pytest.raises(UserError, match=r"data\.loss_on is 'all', but hidden\.mode is 'capture'"):
        config.load(RunConfig, write(tmp_path, RUN), ["data.loss_on=all"])
    for mode in ("compute", "stream"):
        assert config.load(RunConfig, write(tmp_path, RUN), ["data.loss_on=all", f"hidden.mode={mode}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.samples=2"], r"distill\.samples is 2, but distill\.temperature is 0"),
        (
            ["distill.samples=2", "distill.replies=given", "hidden.mode=compute"],
            r"but distill\.replies is 'given'",
        ),
        (["distill.engine=http", "hidden.mode=compute"], r"engine is 'http', but distill\.server is not set"),
        (["distill.server={url: u, model: m}"], r"engine is 'own', but distill\.server is set"),
        (
            ["distill.engine=http", "distill.server={url: u, model: m}"],
            r"but distill\.engine is 'http': a server",
        ),
        (
            ["distill.engine=http", "distill.server={url: u, model: m, key: k}"],
            r"distill\.server\.key is not a key",
        ),
        *(
            ([f"distill.num_actors={wrong}"], r"expected a whole number")
            for wrong in ("0", "4-2", "0-3", "many")
        ),
        (["distill.gpus_per_actor=1.5"], r"distill\.gpus_per_actor is 1\.5"),
    ],
)
def test_what_cannot_be_distilled_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load(RunConfig, write(tmp_path, RUN), overrides)


def test_actors_are_a_number_or_as_many_as_fit_or_a_range() -> None:
    assert [config.least_and_most(wish) for wish in (3, "3", "auto", "2-8")] == [
        (3, 3), (3, 3), (1, math.inf), (2, 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *(([f"train.num_workers={wrong}"], r"such as 2-8") for wrong in ("0", "4-2", "0-3", "auto", "2-", "few")),
        (["train.placement=strict"], r"train\.placement is 'strict'"),
        (["hidden.gpus_per_actor=1.5"], r"hidden\.gpus_per_actor is 1\.5"),
        (["train.num_workers=1-2", "hidden.mode=stream"], r"Give one number, or set hidden\.mode to 'compute'"),
        (["hidden.gpus_per_actor=0.5", "hidden.mode=stream"], r"Leave the first out"),
        (["train.accelerator_type=L4", "hidden.mode=stream"], r"hidden\.accelerator_type None and train.*'L4'"),
    ],
)
def test_workers_that_cannot_be_placed_are_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.load(RunConfig, write(tmp_path, RUN), overrides)


def test_two_applications_may_not_share_a_route(tmp_path: Path) -> None:
    text = (
        SERVE + "  - name: baseline\n    route_prefix: /medusa\n    args: {model_id: b, base: some/model}\n"
    )
    with pytest.raises(UserError, match="two applications share the route_prefix '/medusa'"):
        config.load(ServeConfig, write(tmp_path, text))


@pytest.mark.parametrize("load", ["concurrency=0", "concurrency=x", "concurrency", "sweep", "synchronous=2"])
def test_an_unknown_load_is_refused_by_name(load: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=load):
        config.load(TrafficConfig, write(tmp_path, TRAFFIC), [f"loads=[{load}]"])


def test_servers_stay_on_this_machine_unless_told_otherwise(tmp_path: Path) -> None:
    """Ray Serve's own default is every interface."""
    assert config.load(ServeConfig, write(tmp_path, SERVE)).http_options.host == "127.0.0.1"


def test_every_key_of_a_run_and_of_traffic_is_described() -> None:
    def undescribed(kind: Any, prefix: str = "") -> list[str]:
        found = []
        for name, field in kind.model_fields.items():
            inner = config._model_of(field.annotation)
            found += undescribed(inner, f"{prefix}{name}.") if inner else []
            found += [prefix + name] if not inner and not field.description else []
        return found

    assert undescribed(RunConfig) + undescribed(TrafficConfig) + undescribed(config.EngineConfig) == [
        "version"
    ]
