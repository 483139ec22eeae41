"""The house has floors: an import points to the same floor or below, and stages never import each other.

Where that holds, a stage can be replaced or run alone, and `medusa_ray.medusa` runs where only torch and
transformers are installed.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "medusa_ray"

PAPER, MATHS, MODEL, STAGES, DOOR = range(5)
STAGE_MODULES = {
    "data",
    "distill",
    "hidden",
    "train",
    "evaluate",
    "serve",
    "bench",
    "profile",
    "hub",
    "exchange",
}
FLOORS = {
    PAPER: {"card", "config", "records", "provenance", "parts", "report", "tools", "traffic"},
    MATHS: {
        f"medusa.{name}"
        for name in (
            *("tree", "ranks", "sizing", "acceptance", "processors", "sampling", "heads", "loss", "kernels"),
            *("allocator", "tensors", "layouts"),
        )
    },
    MODEL: {
        "chat",
        "grammar",
        "openai_api",
        "tgi_api",
        "states",
        *(
            f"medusa.{name}"
            for name in [
                "attention",
                "page_attention",
                "base",
                "backbone",
                "cache",
                "conformance",
                "treepass",
                "compiled",
                "graphs",
            ]
        ),
        *(f"medusa.{name}" for name in ["scheduler", "replies", "guesser", "sharded", "engine", "reference", "states"]),
    },
    STAGES: {*STAGE_MODULES, "interfaces", "shards"},
    DOOR: {"cli", "demo", "doctor"},
}
# The floor where each library first appears.
LIBRARIES = {
    PAPER: {"fsspec", "matplotlib", "numpy", "pyarrow", "pydantic", "pydantic_core", "yaml"},
    MATHS: {"safetensors", "torch", "triton"},
    MODEL: {"llguidance", "peft", "tokenizers", "transformers"},
    STAGES: {
        "bitsandbytes",
        "deepspeed",
        "fastapi",
        "grpc",
        "huggingface_hub",
        "prometheus_client",
        "psutil",
        "ray",
        "starlette",
        "tensorboard",
    },
    DOOR: {"aiohttp", "rich", "typer"},
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path not in (PACKAGE / "__init__.py", PACKAGE / "medusa" / "__init__.py")
}


def floor_of(module: str) -> int:
    """Floor of a module; a folder stands on one floor with all its parts, but `medusa` is on two."""
    for floor, modules in FLOORS.items():
        if module in modules or module.split(".")[0] in modules - {"medusa"}:
            return floor
    raise AssertionError(f"{module} has no floor; give it one in FLOORS and a line in the README's tree")


def imports(path: Path) -> Iterator[str]:
    """Dotted names of all that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            # `from medusa_ray import data` names a module, `from medusa_ray.data import run` one inside it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_modules(path: Path) -> Iterator[str]:
    for name in imports(path):
        if name.startswith("medusa_ray."):
            inner = name.removeprefix("medusa_ray.")
            yield inner if inner in MODULES else inner.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_its_floor_and_below(module: str) -> None:
    floor = floor_of(module)
    above = {name for name in own_modules(MODULES[module]) if name and floor_of(name) > floor}
    assert not above, f"{module} stands on floor {floor} and imports {above} from above"


@pytest.mark.parametrize("module", MODULES)
def test_a_library_appears_on_no_lower_floor_than_its_own(module: str) -> None:
    floor = floor_of(module)
    allowed = set().union(
        *(LIBRARIES[below] for below in range(floor + 1)), sys.stdlib_module_names, {"medusa_ray"}
    )
    strangers = {name.split(".")[0] for name in imports(MODULES[module])} - allowed
    assert not strangers, f"{module} stands on floor {floor} and imports {strangers}"


@pytest.mark.parametrize("stage", sorted(STAGE_MODULES & MODULES.keys()))
def test_a_stage_imports_no_other_stage(stage: str) -> None:
    assert not {name.split(".")[0] for name in own_modules(MODULES[stage])} & (STAGE_MODULES - {stage})


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("medusa.")])
def test_the_engine_knows_neither_ray_nor_config(module: str) -> None:
    names = set(imports(MODULES[module]))
    assert not {name.split(".")[0] for name in names} & {"ray", "deepspeed"}
    assert all(name.startswith("medusa_ray.medusa.") for name in names if name.startswith("medusa_ray"))


@pytest.mark.parametrize(
    ("module", "too_heavy"),
    [
        ("medusa_ray.config", "torch ray transformers"),
        ("medusa_ray.cli", "torch ray transformers pydantic pyarrow"),
    ],
)
def test_what_has_to_answer_at_once_loads_nothing_heavy(module: str, too_heavy: str) -> None:
    code = f"import sys, {module}; print(*sys.modules.keys() & set({too_heavy.split()!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_no_module_is_a_drawer_for_leftovers() -> None:
    assert not {name.split(".")[-1] for name in MODULES} & {"utils", "util", "common", "helpers", "misc"}


def test_every_module_has_a_line_in_the_readmes_tree() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    files = {path.relative_to(PACKAGE) for path in MODULES.values()}
    missing = [
        str(file)
        for file in files
        if (file.parent.name if file.stem == "__init__" else file.name) not in readme
    ]
    assert not missing, f"README.md does not say what these are: {sorted(missing)}"
