"""heads/ and the run around it -> heads/README.md, the model card.

Every figure is copied from a file of the run, and what nobody measured or stated is said to be so. The card goes where
the heads go, so that no path of the machine that trained them is in it.
"""

import json
import os
import re
from dataclasses import dataclass
from math import prod
from typing import Any

import fsspec
import yaml

from medusa_ray import provenance
from medusa_ray.config import least_and_most

FILE, SETTINGS = "README.md", "card.json"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# The hub knows adapter, finetune, merge and quantized. Heads are none of them; like an adapter, and unlike the others,
# they are nothing without the base beside them. Left unsaid, the hub would take them for a finetune.
RELATION = "adapter"
LAYOUTS = {
    "own": "an output layer of its own",
    "shared": "the base's output layer",
    "lowrank": "the base's output layer and a term of rank {rank} of its own",
}


def write(heads: str, settings: dict[str, Any] | None = None) -> None:
    """Writes the card of the heads folder `heads`, from what there is of it and of the run that it lies in.

    settings: the values of config.CardConfig, kept in card.json; None takes those from last time.
    """
    heads = heads.rstrip("/")
    if settings is not None:
        provenance.write_json(f"{heads}/{SETTINGS}", settings)
    with fsspec.open(f"{heads}/{FILE}", "w", encoding="utf-8") as file:
        file.write(render(Facts.read(heads)))


def weights_in(heads: str) -> list[str]:
    """URIs of the safetensors files in a folder; heads have one."""
    filesystem, path = fsspec.core.url_to_fs(heads)
    return sorted(filesystem.unstrip_protocol(file) for file in filesystem.glob(f"{path}/*.safetensors"))


# ------------------------------------------------------------------------------------------------------ facts


@dataclass(frozen=True)
class Shape:
    """What the tensors say of themselves; configs are known to be wrong."""

    num_heads: int
    num_layers: int
    layout: str
    rank: int
    draft_vocab_size: int | None  # None: the whole vocabulary
    num_parameters: int
    dtype: str

    @classmethod
    def read(cls, heads: str) -> "Shape":
        """From the header of the one safetensors file. Raises FileNotFoundError when there is none."""
        if not (files := weights_in(heads)):
            raise FileNotFoundError(
                f"{heads} has no safetensors file. Give a folder that `medusa-ray train` wrote."
            )
        with fsspec.open(files[0], "rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        tensors = {name: facts for name, facts in header.items() if name[0].isdecimal()}
        num_layers = sum(name.startswith("0.") and name.endswith(".linear.weight") for name in tensors)
        up = tensors.get(f"0.{num_layers}.up.weight")
        return cls(
            num_heads=len({name.split(".")[0] for name in tensors}),
            num_layers=num_layers,
            layout="own" if f"0.{num_layers}.weight" in tensors else "lowrank" if up else "shared",
            rank=up["shape"][1] if up else 0,
            draft_vocab_size=header["token_map_M"]["shape"][0] if "token_map_M" in header else None,
            num_parameters=sum(prod(facts["shape"]) for facts in tensors.values()),
            dtype={"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[
                tensors["0.0.linear.weight"]["dtype"]
            ],
        )


@dataclass(frozen=True)
class Facts:
    """What a card is made of. Keys: see records.py; a mapping is empty where the run has not got that far."""

    shape: Shape
    config: dict[str, Any]
    settings: dict[str, Any]
    accuracy: dict[str, Any]
    tree: dict[str, Any]
    made: dict[str, Any]  # provenance of the heads, of their distilled rows and of their prompts
    distilled: dict[str, Any]
    prompts: dict[str, Any]
    evaluation: dict[str, Any]
    report: dict[str, Any]
    adapter: dict[str, Any]  # adapter_config.json of the base, where it is an adapter in a folder

    @classmethod
    def read(cls, heads: str) -> "Facts":
        """Leaves out what lies in the run but belongs to other heads."""
        run = os.path.dirname(heads) or "."
        config, made = _json(f"{heads}/config.json"), provenance.read(heads) or {}
        accuracy, inputs = _json(f"{heads}/accuracy.json"), made.get("inputs", {})
        report = _json(f"{run}/report/report.json")
        if report and report["heads"] != accuracy.get("heads"):
            report = {}
        hidden = provenance.read(f"{run}/hidden") or {}
        distilled_key = inputs.get("distilled") or hidden.get("inputs", {}).get("distilled")
        is_stale = hidden and inputs.get("hidden") not in (None, hidden["key"])
        distilled = {} if is_stale else _record(f"{run}/distilled", distilled_key)
        evaluated = _record(f"{run}/evaluation").get("inputs", {}).get("heads") == provenance.digest(heads)
        return cls(
            shape=Shape.read(heads),
            config=config,
            settings=_json(f"{heads}/{SETTINGS}"),
            accuracy=accuracy,
            tree=_json(f"{heads}/tree.json"),
            made=made,
            distilled=distilled,
            prompts=_record(f"{run}/prompts", distilled["inputs"].get("prompts")) if distilled else {},
            evaluation=_json(f"{run}/evaluation/evaluation.json") if evaluated else {},
            report=report,
            adapter=_json(f"{config.get('base_model_name_or_path')}/adapter_config.json"),
        )

    @property
    def base(self) -> str:
        return self.config.get("base_model_name_or_path") or ""

    @property
    def joint(self) -> dict[str, Any]:
        """Settings of Medusa-2, where the base was trained too."""
        return self.made.get("config", {}).get("joint") or {}

    @property
    def hub_base(self) -> str | None:
        """Hub name of the base, where it has one."""
        base = self.settings.get("base_model") or self.base
        return base if _is_hub_name(base) else None

    @property
    def adapted(self) -> str | None:
        """Hub name of what the base is an adapter of, where that is known."""
        base = self.adapter.get("base_model_name_or_path") or ""
        return base if _is_hub_name(base) else None

    @property
    def revision(self) -> str | None:
        config = self.made.get("config", {})
        return config.get("model", config).get("revision")


def _json(uri: str) -> dict[str, Any]:
    """A file that need not be there."""
    try:
        return provenance.read_json(uri)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def _record(folder: str, key: str | None = None) -> dict[str, Any]:
    """Provenance of a folder, unless it is another than that of `key`."""
    record = provenance.read(folder) or {}
    return record if key in (None, record.get("key")) else {}


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not os.path.isdir(name)


# ------------------------------------------------------------------------------------------------------- card


def render(facts: Facts) -> str:
    """The card in Markdown, with the front matter that the hub reads."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{front}---",
        f"# Medusa heads for {facts.hub_base or _named(facts.base)}",
        facts.settings.get("description") or "",
        _what(facts),
        "## What they bring",
        _acceptance(facts),
        _speed(facts),
        "## Is the text the same?",
        _lossless(facts),
        "## How they were trained",
        _recipe(facts),
        "## How to load them",
        _loading(facts),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(facts: Facts) -> dict[str, Any]:
    """What the hub indexes. A licence that nobody stated is left out, and so are names that are not the hub's."""
    found: dict[str, Any] = {}
    if base := facts.hub_base or facts.adapted:
        found |= {"base_model": base, "base_model_relation": RELATION}
    if facts.settings.get("license"):
        found["license"] = facts.settings["license"]
    if datasets := _datasets(facts):
        found["datasets"] = datasets
    tags = ["medusa", "speculative-decoding", *(["medusa-2"] if facts.joint else [])]
    return found | {"library_name": "medusa_ray", "pipeline_tag": "text-generation", "tags": tags}


def _what(facts: Facts) -> str:
    shape, base = facts.shape, facts.hub_base
    size = facts.config.get("vocab_size")
    vocabulary = f"all {size:,} tokens of the base" if size else "all tokens of the base"
    if shape.draft_vocab_size is not None:
        vocabulary = f"{shape.draft_vocab_size:,} of {vocabulary}, those that training labels name most often"
    named = f"`{base}`" if base else f"{_named(facts.base)}, which is not on the hub"
    if facts.adapter:
        named += f", an adapter on {_named(facts.adapter.get('base_model_name_or_path') or '')}"
    revision = f"revision `{facts.revision}`" if facts.revision else "its default branch, no revision pinned"
    output = LAYOUTS[shape.layout].format(rank=shape.rank)
    licence = facts.settings.get("license") or "not stated"
    rows = [
        ("base", f"{named}; {revision}" if base or facts.adapted else named),
        ("heads", f"{shape.num_heads}, each of {shape.num_layers} residual block(s) and {output}"),
        ("layout", shape.layout),
        ("they guess", vocabulary),
        ("parameters", f"{shape.num_parameters:,}, {shape.dtype}"),
        ("licence of the heads", f"{licence}; the base keeps its own"),
    ]
    kind = "Medusa-2" if facts.joint else "Medusa-1"
    text = (
        f"{kind} decoding heads ([arXiv 2401.10774](https://arxiv.org/abs/2401.10774)), which guess several tokens "
        "after the next one. The base verifies the guesses in one pass and keeps those that it would have said. The "
        "weights of the base are not in this repository."
    )
    if facts.joint:
        text += (
            f"\n\n**The base has changed.** It was trained together with the heads, by a LoRA adapter of rank "
            f"{facts.joint['rank']}, and its replies are no longer quite those of the model under the adapter. The "
            "heads belong to the adapted model alone."
        )
    return f"{text}\n\n{_table(('', ''), rows)}"


def _acceptance(facts: Facts) -> str:
    heads, accepted = facts.accuracy.get("heads", {}), facts.accuracy.get("accepted_per_position", {})
    per_step = facts.accuracy.get("acceptance", {}) | {
        key: value for key, value in facts.report.get("acceptance", {}).items() if key == "served" and value
    }
    if not heads:
        return "The heads were not evaluated: run `medusa-ray evaluate`."
    counts = facts.accuracy.get("prompts", {})
    n = {
        name: f" (n = {counts[name]} prompts)" if counts.get(name) else ""
        for name in ("scored", "out_of_domain")
    }
    rows = [
        (
            head + 1,
            f"{head + 2} places ahead",
            *(_figure(figures, head) for figures in (heads["top1"], heads["top5"])),
            *(_figure(accepted.get(name, []), head) for name in ("chain", "out_of_domain_chain")),
        )
        for head in range(len(heads["top1"]))
    ]
    headers = ("head", "guesses the token", "top-1", "top-5", "accepted in a step", "the same out of domain")
    names = {"chain": f"a chain of the heads' best guesses{n['scored']}"}
    names |= {
        key: f"a tree of {key.removeprefix('calibrated_')} guesses{n['scored']}"
        for key in per_step
        if key.startswith("calibrated_")
    }
    names |= {
        "out_of_domain_chain": f"the chain, out of domain{n['out_of_domain']}",
        "served": "as served, the tree adapting to the load",
    }
    steps = [(text, _show(per_step.get(key), "{:.2f}")) for key, text in names.items()]
    text = (
        f"Measured on replies of the base to held-out prompts{n['scored']}. Top-1 and top-5 ask each head at every "
        "position; a guess is accepted in a step of the chain when it and all before it are what the base says."
    )
    return "\n\n".join(
        [
            text,
            _table(headers, rows),
            "Acceleration, in tokens per step; one without heads has 1:",
            _table(("", "tokens per step"), steps),
        ]
    )


def _speed(facts: Facts) -> str:
    arms, speedup = facts.report.get("arms", {}), facts.report.get("speedup", {})
    if not speedup:
        return (
            "**Speed was not measured.** Acceleration is not speedup: a step that verifies guesses costs more than one "
            "that does not. `medusa-ray bench` and `medusa-ray report` measure it on your hardware."
        )
    rows = []
    for load, ratio in speedup.items():
        both = [arms[arm]["load"][load] for arm in ("baseline", "medusa")]
        interval = " [{:.2f}, {:.2f}]".format(*ratio["ci95"]) if ratio["ci95"] else ""
        rows.append(
            (
                load,
                both[1]["requests"],
                *(_show(arm["output_tokens_per_s"], "{:.0f}") for arm in both),
                _show(ratio["output_tokens_per_s"], "{:.2f}x"),
                _show(ratio["tpot"], "{:.2f}x") + interval,
            )
        )
    headers = (
        *("load", "n, requests per arm", "tokens/s without heads", "with heads", "speedup in tokens/s"),
        "speedup in time per token [95%]",
    )
    beside = facts.report["arms"]["medusa"]["acceleration"]
    steps = f" at an acceleration of {beside:.2f} tokens per step" if beside else ""
    hardware, versions = (
        facts.report["hardware"],
        _versions(facts.report["versions"], "torch", "medusa_ray", "ray"),
    )
    units = (("gpu", ""), ("cpu", ""), ("cores", " cores"), ("memory_gib", " GiB"))
    machine = ", ".join(f"{hardware[key]}{unit}" for key, unit in units if hardware.get(key))
    return "\n\n".join(
        [
            f"Speedup as served{steps}, on {machine or 'unknown hardware'} ({versions}):",
            _table(headers, rows),
            facts.report["verdict"]["reason"],
        ]
    )


def _lossless(facts: Facts) -> str:
    parity = facts.evaluation.get("parity", {})
    typical = "Typical acceptance is the exception: a request that asks for it gets replies of another distribution."
    if not parity:
        return f"Whether replies with heads equal those without was not checked for these heads. {typical}"
    exact, prompts, near_ties = parity["token_exact"], parity["prompts"], parity.get("near_ties", 0)
    dtype = facts.evaluation.get("model", {}).get("dtype")
    text = (
        f"Greedy replies with these heads, without them, and of transformers' own `generate` are the same, token for "
        f"token, on {exact} of {prompts} held-out prompts{f' ({dtype})' if dtype else ''}."
    )
    if near_ties:
        text += f" On {near_ties} more they part only where the base's two best scores all but coincide."
    if wrong := prompts - exact - near_ties:
        text += f" **On {wrong} they differ, which is a fault: do not use these heads before it is found.**"
    return f"{text} {typical}"


def _recipe(facts: Facts) -> str:
    config = facts.made.get("config", {})
    train, joint = config.get("train", {}), facts.joint
    if not train:
        return "There is no record of how the heads were trained."
    replies, rows = facts.distilled.get("config", {}).get("distill", {}), facts.distilled.get("rows", {})
    sources = ", ".join(map(_source, facts.prompts.get("sources", {}).get("train", []))) or "not on record"
    told = {"hard": "the tokens that came", "soft": "the base's likeliest tokens"}
    loss_on = facts.prompts.get("config", {}).get("loss_on") or config.get("loss_on")
    whose = {
        "last": "the last assistant turn",
        "assistant": "all assistant turns",
        "all": "prompt and last turn",
    }
    sampled = (
        "temperature {temperature}, top-p {top_p}".format(**replies)
        if replies.get("temperature")
        else "greedy"
    )
    distilled = {
        "generate": f"the base's own replies to these prompts (self-distillation), {sampled}",
        "given": "the replies of the chats as they were, not the base's own",
    }
    num_workers = int(least_and_most(train["num_workers"])[1])
    positions = train["batch_size"] * train["gradient_accumulation_steps"] * num_workers
    lines = [
        ("Data", f"{sources}. Licence of the data: {facts.settings.get('data_license') or 'not stated'}"),
        ("Replies", distilled.get(replies.get("replies", ""), "not on record")),
        (
            "Rows",
            f"{rows['good']:,} of {rows['in']:,}"
            + (f", {num:,} tokens of replies" if (num := facts.distilled.get("num_reply_tokens")) else "")
            if rows
            else "not on record",
        ),
        (
            "Labels",
            f"{told[train.get('labels', 'hard')]}" + (f", of {whose[loss_on]}" if loss_on in whose else ""),
        ),
        (
            "Heads alone",
            f"{train['epochs']} epochs in steps of {positions:,} positions; learning rate {train['learning_rate']:g}, "
            f"{train['lr_scheduler']}, {train['warmup_steps']} steps of warm-up; weight of head k "
            f"{train['head_weight']:g}^k; {train['dtype']}, seed {train['seed']}",
        ),
    ]
    if joint:
        lines.append(
            (
                "Heads and base together",
                f"{joint['epochs']} epochs in steps of "
                f"{joint['batch_size'] * joint['gradient_accumulation_steps'] * num_workers} rows; LoRA of "
                f"rank {joint['rank']}, alpha {joint['alpha']}, on {joint['targets']}; learning rate "
                f"{joint['learning_rate']:g} of the adapter, {joint['heads_learning_rate']:g} of the heads; weight of "
                f"the heads' loss {joint['heads_weight']:g}",
            )
        )
    lines.append(("Steps", f"{facts.made['num_steps']:,}, the last of these trainings"))
    if calibrated := facts.tree.get("calibrated_on"):
        lines.append(("Tree", f"{facts.tree['nodes']} guesses, shaped on {calibrated} held-out prompts"))
    versions = _versions(facts.made["versions"], "medusa_ray", "torch", "transformers", "deepspeed", "ray")
    lines.append(("Software", f"{versions}; commit {facts.made['revision'] or 'not on record'}"))
    return "\n".join(f"* {name}: {text}." for name, text in lines)


def _datasets(facts: Facts) -> list[str]:
    """Hub names of the data sets that were trained on."""
    sources = facts.prompts.get("sources", {}).get("train", [])
    parts = [source.split("@")[0].split("/") for source in sources if source.startswith("hf://datasets/")]
    return sorted({"/".join(part[3:5]) for part in parts})


def _source(uri: str) -> str:
    """A file of the hub as it is; of any other place its name alone, which says nothing of whose machine that was."""
    if uri.startswith("hf://"):
        return f"`{uri}`"
    return f"`{uri.rstrip('/').rpartition('/')[2]}`, which is not public"


def _named(base: str) -> str:
    """A hub name, or the last part of a path."""
    if _is_hub_name(base):
        return base
    return f"`{base.rstrip('/').rpartition('/')[2]}` (a local folder)" if base else "an unnamed model"


# ---------------------------------------------------------------------------------------------------- loading


def _loading(facts: Facts) -> str:
    shape, base = facts.shape, facts.hub_base or "BASE"
    stands = "`HEADS` stands for the folder of these heads"
    if base == "BASE":
        stands += ", `BASE` for that of their base"
    notes = [f"{stands}, `OUT` for a new one."]
    if facts.adapter:
        notes.append(
            "The base is an adapter: medusa_ray merges it when it loads it. For the others add `--with-base` to the "
            "export: OUT/base is then the merged model, and the base for their commands."
        )
    serve = {
        "applications": [
            {
                "name": "medusa",
                "import_path": "medusa_ray.serve:build_app",
                "args": {"model_id": "medusa", "base": base, "heads": "HEADS", "tree": "auto"},
            }
        ]
    }
    revision = f', revision="{facts.revision}"' if facts.revision and facts.hub_base else ""
    ours = (
        "**medusa_ray**, as a library or behind the OpenAI API (`medusa-ray serve serve.yaml`):\n\n"
        "```python\nfrom medusa_ray.medusa.engine import Engine\n\n"
        f'engine = Engine.load("{base}", heads="HEADS", tree="auto"{revision})\n'
        "done = engine.generate([prompt_ids], max_new_tokens=64)\n```\n\n"
        f"```yaml\n{yaml.safe_dump(serve, sort_keys=False)}```"
    )
    config = "`base_model_name_or_path` in config.json, or `--base` of the export, must name the base as it finds it"
    speculation = json.dumps({"method": "medusa", "model": "OUT", "num_speculative_tokens": shape.num_heads})
    tgi_folder = "HEADS" if fits(shape, "tgi") == [] else "OUT"
    others = [
        _server(
            shape,
            "TGI",
            "tgi",
            f"text-generation-launcher --model-id {tgi_folder}",
            f"{config}. It verifies the chain, and takes the base's default branch whatever the revision.",
        ),
        _server(
            shape,
            "vLLM",
            "vllm",
            f"vllm serve {base} --speculative-config '{speculation}'",
            "It verifies the chain, with all heads.",
        ),
        _server(
            shape,
            "TensorRT-LLM",
            "trtllm",
            "python examples/medusa/convert_checkpoint.py --model_dir "
            f"{base} --medusa_model_dir OUT --num_medusa_heads {shape.num_heads} --output_dir CHECKPOINT\n"
            "trtllm-build --checkpoint_dir CHECKPOINT --output_dir ENGINE --speculative_decoding_mode medusa",
            "What its runtime wants as `--medusa_choices` are the `paths` of tree.json.",
        ),
        _server(
            shape,
            "ModelOpt",
            "modelopt",
            None,
            "OUT is then a whole model, base and heads: call `modelopt.torch.opt.enable_huggingface_checkpointing()`, "
            'and `AutoModelForCausalLM.from_pretrained("OUT")` has the heads.',
        ),
        _server(
            shape,
            "FasterDecoding/Medusa",
            "fasterdecoding",
            None,
            f'`medusa.model.medusa_model.MedusaModel.from_pretrained("OUT")`; {config}.',
        ),
    ]
    return "\n\n".join([*notes, ours, *others])


def fits(shape: Shape, server: str) -> list[str] | None:
    """Words of the export that a server's format needs beyond its name; None where it cannot hold the heads at all.

    An empty list for TGI means that the folder is in its format as it is. See medusa/layouts.py.
    """
    if server == "vllm":
        return ["--materialise"] if shape.layout == "lowrank" else []
    if shape.draft_vocab_size is not None:
        return ["--materialise"] if shape.layout == "shared" else None
    alone = shape.layout == "own" or (server == "tgi" and shape.layout == "shared" and shape.num_layers == 1)
    return [] if alone else ["--materialise"]


def _server(shape: Shape, name: str, layout: str, command: str | None, note: str) -> str:
    more = fits(shape, layout)
    if more is None:
        return f"**{name}** cannot hold heads that guess {shape.draft_vocab_size:,} tokens only."
    export = " ".join(["medusa-ray export HEADS OUT --format", layout, *more])
    commands = [] if layout == "tgi" and not more else [export]
    as_is = "" if commands else " reads the folder as it is"
    return f"**{name}**{as_is}:\n\n```bash\n{chr(10).join(filter(None, [*commands, command]))}\n```\n\n{note}"


# ------------------------------------------------------------------------------------------------------- text


def _table(headers: tuple[Any, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _versions(versions: dict[str, str], *names: str) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)


def _figure(figures: list[float], head: int) -> str:
    return _show(figures[head] if head < len(figures) else None, "{:.3f}")


def _show(value: float | None, form: str) -> str:
    return "not measured" if value is None else form.format(value)
