"""Imports point down only, third parties stay behind their walls, and the losses need torch alone.

`violations` reads source text and never imports it, so an import under `if TYPE_CHECKING` or inside
a function counts too: whoever knows the name of a room above depends on it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "vpgea_fast"

# From the top down. A room is a file or a folder directly under vpgea_fast/. It may import itself
# (the files of one folder) and the rooms of lower layers, and no other room of its own layer.
LAYERS = {
    "command line": {"cli"},
    "sweep": {"sweep"},
    "trainer": {"hf_trainer", "prepare", "smol", "trainer"},
    # When a run evaluates and saves.
    "schedule": {"schedule"},
    "composition": {"build", "dry_run", "run_dir"},
    # A step until its first update.
    "steps": {"step_start"},
    "evaluation": {"doctor", "evaluate", "gradients", "measure", "needs", "report", "run_state"},
    # What an evaluation leaves behind, and what is said of it.
    "records of evaluations": {"evaluation"},
    # What a step, a check or an evaluation is made of.
    "preparation": {"check", "collect", "diagnostics", "intake"},
    # What a run asks of its questions, before a weight is read and again in each step.
    "questions": {"questions"},
    # Models of a run: those that it trains, and a frozen one beside them, for whoever collects.
    "models": {"policies", "reference"},
    # What a step is while its updates are made.
    "updates": {"updates"},
    "rows": {"rows"},
    "stages": {
        "callbacks",
        "checkpoint",
        "data",
        "durations",
        "estimate",
        "model",
        "optim",
        "passes",
        "profiling",
        "prompts",
        "rollout",
        "scoring",
        "stop",
        "tiny",
        "verify",
        "watch",
    },
    # A model cut over processes, and its parts read.
    "sharding": {"shard"},
    # The one meaning of the weight files, to every reader of them.
    "weights": {"weights"},
    # The rest of a model directory: configuration, tokenizer, sampling settings.
    "model directory": {"model_dir"},
    # The losses inside models that other trainers hold: no stage of a run needs them.
    "other trainers": {"integrations"},
    # What a family of models computes, measured on a tiny clone.
    "families": {"families"},
    # Pure functions of tensors and records, with no configuration: what more than one stage needs.
    "tensor library": {
        "activations",
        "attention",
        "distillation",
        "embedding",
        "losses",
        "packing",
    },
    "services": {"bound", "distributed", "hosted", "hub", "manual", "metrics", "new_folder"},
    # Every section, with that of the objective as its registry has it.
    "configuration": {"config"},
    # What a metric means, those of the guards as their table has them.
    "meanings": {"book"},
    "methods": {"objectives"},
    "method library": {"advantage"},
    "records": {"types"},
    "text": {"interface", "names", "spans", "strict_yaml", "values"},
    "kernels": {"kernels"},
}
LAYER_NAMES = list(LAYERS)
DEPTH = {room: depth for depth, rooms in enumerate(LAYERS.values()) for room in rooms}

# Third party -> the only modules (or folders of modules) of this project that may name it.
WALLS = {
    "vllm": "vpgea_fast.rollout.vllm",
    "triton": "vpgea_fast.kernels",
    "flash_attn": "vpgea_fast.attention",
    "flash_attn_interface": "vpgea_fast.attention",
    "liger_kernel": "vpgea_fast.model",
    "torchao": "vpgea_fast.optim",
    "trl": "vpgea_fast.integrations.trl",
    "verl": "vpgea_fast.integrations.verl",
    "torchtitan": "vpgea_fast.integrations.torchtitan",
}
KERNEL_IMPORTS = {"torch", "triton", *sys.stdlib_module_names}


def imported_names(module: str, tree: ast.Module, *, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every dotted name that a module imports, absolute, with its line.

    `from a import b` gives both `a` and `a.b`, since b may be a module. Literal arguments of
    `import_module` and `__import__` count as imports.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                levels_up = node.level - is_package
                parents = module.split(".")[: len(module.split(".")) - levels_up]
                base = ".".join([*parents, *filter(None, [node.module])])
            yield base, node.lineno
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            if called in {"import_module", "__import__"} and node.args:
                name = node.args[0]
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    yield name.value, node.lineno


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def room_of(name: str) -> str | None:
    """The room of a dotted name in the package; None for the package itself and `__version__`."""
    room = name.split(".")[1] if within(name, PACKAGE) and name != PACKAGE else None
    return None if room == "__version__" else room


def complaint(module: str, room: str, name: str) -> str | None:
    """What is wrong with `module`, which lives in `room`, importing `name`; None if nothing is."""
    if within(name, "kernels"):
        return "`kernels` alone is the Hugging Face package: write vpgea_fast.kernels"
    for third_party, home in WALLS.items():
        if within(name, third_party) and not within(module, home):
            return f"only {home} may import {third_party}"
    if room == "kernels" and not within(name, f"{PACKAGE}.kernels"):
        if name.split(".")[0] in KERNEL_IMPORTS:
            return None
        return "kernels/ may import torch, triton, the standard library and its own files"
    target = room_of(name)
    if target is None or target == room:
        return None
    if target not in DEPTH:
        return f"there is no room {target!r} in LAYERS of tests/test_layering.py"
    if DEPTH[target] > DEPTH[room]:
        return None
    here, there = LAYER_NAMES[DEPTH[room]], LAYER_NAMES[DEPTH[target]]
    return f"{room} ({here}) may not import {target} ({there}): imports point down only"


def violations(module: str, source: str, *, is_package: bool = False) -> list[str]:
    """All broken rules of one module, each as `module:line imports name: reason`."""
    tree = ast.parse(source)
    if module == PACKAGE:  # what a function imports, here `__getattr__`, costs nothing until asked
        tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        why = f"`import {PACKAGE}` must cost nothing"
        names = imported_names(module, tree, is_package=is_package)
        return [f"{module}:{line} imports {name}: {why}" for name, line in names]
    names = list(imported_names(module, tree, is_package=is_package))
    room = room_of(module)
    if room not in DEPTH:
        where = f"add {room!r} to the lowest fitting layer in LAYERS of tests/test_layering.py"
        return [f"{module} fits no layer: {where}, and a line for it to docs/tree.md"]
    found: dict[tuple[int, str], str] = {}  # a line that imports ten names breaks a rule once
    for name, line in names:
        if why := complaint(module, room, name):
            found.setdefault((line, why), name)
    return [f"{module}:{line} imports {name}: {why}" for (line, why), name in found.items()]


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every module of the package, kernels/ under its imported name."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[1] != "kernels":  # the symlink, which rglob follows in Python < 3.13
            yield ".".join(parts).removesuffix(".__init__"), path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join([PACKAGE, *parts]).removesuffix(".__init__"), path


def test_imports_point_down():
    broken = [
        line
        for name, path in modules()
        for line in violations(name, path.read_text(), is_package=path.stem == "__init__")
    ]
    assert not broken, "\n" + "\n".join(broken)


def test_every_room_of_a_layer_exists():
    rooms = {room_of(name) for name, _ in modules()}
    assert sorted(DEPTH.keys() - rooms) == []
    homes = {home for home in WALLS.values() if not any(within(n, home) for n, _ in modules())}
    assert homes == set()


def test_no_files_import_each_other_in_a_circle():
    """Within a folder, too, where the layers say nothing."""
    files = dict(modules())
    graph = {}
    for name, path in files.items():
        package = path.stem == "__init__"
        found = imported_names(name, ast.parse(path.read_text()), is_package=package)
        graph[name] = {other for other, _ in found if other in files and other != name}
    # A folder's own page collects its files, and importing one of them runs it first: not a circle.
    pages = {name for name, path in files.items() if path.stem == "__init__"}
    for name in graph:
        graph[name] -= {page for page in pages if within(name, page)}
    done: set[str] = set()

    def walk(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        walk(name, [])


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("vpgea_fast.packing", "from vpgea_fast.types import TrainRow", None),
        ("vpgea_fast.packing", "import torch\nfrom vpgea_fast import __version__", None),
        ("vpgea_fast.rollout.hf", "from vpgea_fast.rollout import vllm", None),
        ("vpgea_fast.trainer", "from . import packing, losses", None),
        ("vpgea_fast.kernels.fused", "from vpgea_fast.kernels.reference import f", None),
        ("vpgea_fast.packing", "from vpgea_fast.trainer import fit", "point down only"),
        ("vpgea_fast.packing", "from vpgea_fast.model import load", "point down only"),
        ("vpgea_fast.packing", "from vpgea_fast import model", "point down only"),
        ("vpgea_fast.packing", "from . import model", "point down only"),
        ("vpgea_fast.rollout.hf", "from ..model import load", "point down only"),
        ("vpgea_fast.types", "from vpgea_fast.config import Config", "point down only"),
        ("vpgea_fast.packing", "if x:\n    import vpgea_fast.cli", "point down only"),
        ("vpgea_fast.packing", "def f():\n    import vpgea_fast.cli", "point down only"),
        ("vpgea_fast.cli", "from vpgea_fast.utils import f", "no room 'utils'"),
        ("vpgea_fast.utils", "", "fits no layer"),
        ("vpgea_fast", "from vpgea_fast.losses import vpgea_loss", "must cost nothing"),
        ("vpgea_fast", "if x:\n    import torch", "must cost nothing"),
        ("vpgea_fast", "def __getattr__(name):\n    from vpgea_fast import trainer", None),
        ("vpgea_fast.cli", "import kernels", "Hugging Face package"),
        ("vpgea_fast.cli", "from kernels.reference import f", "Hugging Face package"),
        ("vpgea_fast.trainer", "import vllm", "only vpgea_fast.rollout.vllm"),
        ("vpgea_fast.rollout.hf", "from vllm import LLM", "only vpgea_fast.rollout.vllm"),
        ("vpgea_fast.cli", "importlib.import_module('vllm')", "only vpgea_fast.rollout.vllm"),
        ("vpgea_fast.losses", "import triton.language as tl", "only vpgea_fast.kernels"),
        ("vpgea_fast.trainer", "from liger_kernel import ops", "only vpgea_fast.model"),
        ("vpgea_fast.kernels.fused", "import numpy", "torch, triton, the standard library"),
        ("vpgea_fast.kernels.fused", "import vpgea_fast.types", "torch, triton, the standard"),
        ("vpgea_fast.kernels.fused", "from ..types import Path", "torch, triton, the standard"),
    ],
)
def test_the_check_tells_good_from_bad(module, source, reason):
    found = violations(module, source)
    if reason is None:
        assert found == []
    else:
        assert len(found) >= 1
        assert reason in found[0]


def test_relative_imports_of_a_package_file_start_in_its_folder():
    assert violations("vpgea_fast.rollout", "from . import hf", is_package=True) == []
    assert violations("vpgea_fast.rollout", "from .. import types", is_package=True) == []
    (found,) = violations("vpgea_fast.rollout", "from .. import model", is_package=True)
    assert found.startswith("vpgea_fast.rollout:1 imports vpgea_fast.model: ")


def test_kernels_is_one_folder_without_a_package_file():
    assert (ROOT / PACKAGE / "kernels").resolve() == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_no_file_outside_the_package_imports_bare_kernels():
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        names = imported_names(path.stem, tree, is_package=False)
        bare = [f"{path.name}:{line}" for name, line in names if within(name, "kernels")]
        assert not bare, f"write vpgea_fast.kernels in {bare}"


# The project's own requirements that torch does not need, plus what no install has to have.
LOSSES_WITHOUT = """
import sys
refused = set(sys.argv[1:])
class Wall:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in refused:
            raise ModuleNotFoundError("refused by this test: " + name, name=name)
sys.meta_path.insert(0, Wall)
import vpgea_fast.losses
print(*sorted(m for m in sys.modules if m.startswith("vpgea_fast.")))
"""
REFUSED = (
    "transformers triton pydantic yaml rich datasets math_verify matplotlib pyarrow safetensors"
    " tokenizers huggingface_hub kernels vllm flash_attn liger_kernel torchao trl wandb"
).split()


def test_losses_import_with_torch_alone():
    done = subprocess.run(
        [sys.executable, "-c", LOSSES_WITHOUT, *REFUSED], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rooms = {room_of(name) for name in done.stdout.split()}
    assert rooms <= {"losses", "kernels"}, f"importing the losses imported {rooms} too"


def test_the_trainer_imports_without_a_warning():
    """In a process of its own: tests that fork their programs have imported it before."""
    command = [sys.executable, "-W", "error", "-c", "import vpgea_fast.trainer"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_command_line_does_not_wait_for_torch():
    """`vpgea --version`, `vpgea keys` and every refusal would: torch takes over a second."""
    code = "import sys, vpgea_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_outside_objectives_asks_for_a_type_of_objective():
    asks = re.compile(r"VpgeaConfig|GrpoConfig|isinstance\(.*objective")
    files = [f for f in (ROOT / "vpgea_fast").rglob("*.py") if "objectives" not in f.parts]
    assert len(files) > 50
    found = [
        f"{f}: {line}" for f in files for line in f.read_text().splitlines() if asks.search(line)
    ]
    assert found == []
