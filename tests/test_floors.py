"""Imports go down only, the core needs no Triton, and libraries neither print nor read the environment."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "hylorada_kernels").rglob("*.py"))
LIBRARY = sorted((ROOT / "hylorada").rglob("*.py"))

# what a module of hylorada may import of hylorada: modules of lower floors, and its own floor's from the list on
FLOORS = [
    ["config", "files", "hub", "peak_memory", "provenance", "row_attention", "statistics", "tables", "trackers"],
    ["assets", "checkpoint", "flags", "sources", "pretrained", "position", "position_table", "report", "storage"],
    ["data"],
    ["daa", "embeddings", "even_batches", "landmark", "lora", "perplexity", "rope"],
    ["retrieval", "run_state"],
    ["evaluation"],
    ["s2_attention", "sparse_mlp"],
    ["components", "footprint"],
    ["estimate"],
    ["model"],
    ["baselines", "export", "trainer", "integrations.peft_files", "integrations.peft_tuner", "integrations.trl"],
    ["comparison", "integrations.peft", "plan"],
    ["benchmark", "run_file"],
    ["ablation"],
    ["cli"],
    ["__main__"],
]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imported_names(path.read_text(encoding="utf-8"), package)


def imported_names(source: str, package: str) -> set[str]:
    """Absolute names of what a module of a package imports, wherever in it; of `from a import b` both a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            start = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def imports_any(path: Path, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imports_of(path) for package in packages)


def offenders(paths, *packages: str) -> list[str]:
    return [module_name(path) for path in paths if imports_any(path, *packages)]


def test_relative_imports_are_understood():
    source = """
import triton.language as tl
from . import eager
def f():
    from ... import backend
    from ..other.op import check
"""
    assert imported_names(source, "package.ops.mine") == {
        "triton.language",
        "package.ops.other.op",
        "package.ops.other.op.check",
        "package",
        "package.backend",
        "package.ops.mine",
        "package.ops.mine.eager",
    }


def test_kernels_know_nothing_of_the_layers_above():
    assert not offenders(KERNELS, "hylorada", "transformers", "peft", "accelerate", "tests", "benchmarks")


def test_only_kernels_and_their_harness_import_triton():
    allowed = {
        path
        for path in KERNELS
        if path.name in ("kernel.py", "_tl.py", "tuning.py") or path.parent == ROOT / "hylorada_kernels/testing"
    }
    assert not offenders([*LIBRARY, *(path for path in KERNELS if path not in allowed)], "triton")


def test_eager_and_kernel_never_import_each_other():
    for op in sorted((ROOT / "hylorada_kernels/ops").glob("*/op.py")):
        package = module_name(op).removesuffix(".op")
        assert not offenders([op.parent / "eager.py"], f"{package}.kernel")
        if (op.parent / "kernel.py").exists():
            assert not offenders([op.parent / "kernel.py"], f"{package}.eager")


def test_ops_know_neither_modules_nor_tests_of_them():
    ops = [path for path in KERNELS if "ops" in path.relative_to(ROOT).parts]
    assert not offenders(ops, "hylorada_kernels.nn", "hylorada_kernels.testing")


def test_backend_knows_no_op():
    assert not offenders([ROOT / "hylorada_kernels/backend.py"], "hylorada_kernels.ops", "hylorada_kernels.nn")


def test_nothing_that_ships_imports_tests_or_benchmarks():
    assert not offenders([*LIBRARY, *KERNELS], "tests", "benchmarks", "pytest")


def test_every_module_of_hylorada_has_a_floor():
    placed = sorted(name for floor in FLOORS for name in floor)
    assert placed == sorted(module_name(path).partition(".")[2] for path in LIBRARY if path.stem != "__init__")


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_hylorada_imports_only_lower_floors(floor):
    above = [f"hylorada.{name}" for level in FLOORS[floor + 1 :] for name in level]
    paths = [ROOT / "hylorada" / f"{name.replace('.', '/')}.py" for name in FLOORS[floor]]
    assert not offenders(paths, *above)


def test_config_imports_nothing_of_the_project():
    assert not imports_any(ROOT / "hylorada/config.py", "hylorada", "hylorada_kernels", "torch", "transformers")


def test_only_backend_reads_the_environment():
    readers = [module_name(path) for path in [*KERNELS, *LIBRARY] if "os.environ" in path.read_text(encoding="utf-8")]
    # assets.py: where the cache is
    assert set(readers) <= {"hylorada_kernels.backend", "hylorada.assets"}


def test_libraries_do_not_print():
    printing = [
        f"{module_name(path)}:{line}"
        for path in [*LIBRARY, *KERNELS]
        if path.name != "__main__.py"
        for line in printing_lines(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not printing


def test_only_the_command_line_writes_to_a_terminal():
    assert offenders([*LIBRARY, *KERNELS], "typer", "rich", "click") == ["hylorada.cli"]


def printing_lines(node: ast.AST) -> list[int]:
    """Lines that call print, outside of the one function whose purpose it is."""
    if isinstance(node, ast.FunctionDef) and node.name == "print_trainable_params":
        return []
    own = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    lines = [line for child in ast.iter_child_nodes(node) for line in printing_lines(child)]
    return [node.lineno, *lines] if own else lines


WITHOUT_TRITON = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
# dill calls it on an instance
PathFinder.find_spec = staticmethod(
    lambda name, *rest: None if name.partition(".")[0] == "triton" else find_spec(name, *rest)
)
"""


def in_new_process(code: str) -> None:
    outcome = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


def test_adapted_linear_trains_without_triton():
    in_new_process(
        WITHOUT_TRITON
        + """
import sys
import torch
import hylorada, hylorada.model, hylorada.trainer, hylorada.evaluation, hylorada_kernels.testing
from hylorada_kernels import HybridLinear, using

linear = torch.nn.Linear(12, 7)
layer = HybridLinear.from_linear(linear, rank=3)
x = torch.randn(5, 12, requires_grad=True)
torch.testing.assert_close(layer(x), linear(x))
torch.nn.init.normal_(layer.lora_b)
layer(x).square().sum().backward()
for tensor in (x, layer.lora_a, layer.lora_b, layer.magnitude, layer.residual_weight):
    assert tensor.grad.abs().sum() > 0

try:
    with using("triton"):
        layer(x)
except RuntimeError as error:
    assert "Triton is not installed" in str(error)
else:
    raise AssertionError("an explicit triton ran without Triton")
assert "triton" not in sys.modules
"""
    )


def test_kernels_load_without_transformers():
    in_new_process("import sys, hylorada_kernels; assert not {'transformers', 'accelerate', 'peft'} & set(sys.modules)")


def test_the_command_line_says_what_it_can_without_torch():
    in_new_process(
        """
import sys
from typer.testing import CliRunner
from hylorada.cli import app

for arguments in (["--help"], ["train", "--help"], ["benchmark", "--help"], ["ablate", "--help"]):
    assert CliRunner().invoke(app, arguments).exit_code == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""
    )


def test_config_loads_without_torch():
    in_new_process(
        "import sys; from hylorada import HyLoRADAConfig; HyLoRADAConfig(); assert 'torch' not in sys.modules"
    )
