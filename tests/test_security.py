"""Nothing that is read can run code, no name in a file leads out of its folder, and what is downloaded is pinned."""

import ast
import re
from pathlib import Path

import pytest

from hylorada import data, pretrained, storage
from hylorada.assets import Distribution

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "hylorada").rglob("*.py")) + sorted((ROOT / "hylorada_kernels").rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {"torch.load", "os.system", "os.popen", "yaml.unsafe_load", "yaml.full_load", "numpy.load", "np.load"}


def unsafe_lines(source: str) -> list[str]:
    """What in a module could run code that a file or a hub brings along."""
    tree = ast.parse(source)
    safe_loaders = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and [ast.unparse(base) for base in node.bases] == ["yaml.SafeLoader"]
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if called in FORBIDDEN_NAMES | FORBIDDEN_CALLS:
            found.append(called)
        if called == "yaml.load":
            loader = given.get("Loader") or (ast.unparse(node.args[1]) if len(node.args) > 1 else "")
            if loader not in safe_loaders | {"yaml.SafeLoader"}:
                found.append("yaml.load without a safe loader")
        found += [f"{name}=True" for name in ("trust_remote_code", "shell") if given.get(name) == "True"]
    return found


# rewrites the source of this package's own kernels, for the tests' interpreter
OWN_SOURCE = ROOT / "hylorada_kernels/testing/_launch.py"


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if path != OWN_SOURCE], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_module_runs_what_a_file_brings(path):
    assert not unsafe_lines(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval(x)",
        "torch.load(path, weights_only=True)",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "class Loader(yaml.Loader): pass\nyaml.load(text, Loader)",
        "f(trust_remote_code=True)",
        "subprocess.run(command, shell=True)",
    ],
)
def test_the_check_finds_what_is_unsafe(source):
    assert unsafe_lines(source)


def test_every_download_is_pinned_by_its_hash():
    pinned = [value for module in (data, pretrained) for value in vars(module).values()]
    pinned += [item for value in pinned if isinstance(value, dict) for item in value.values()]
    pinned = [value for value in pinned if isinstance(value, Distribution)]
    assert pinned and all(re.fullmatch("[0-9a-f]{64}", distribution.sha256) for distribution in pinned)


def test_a_name_in_a_folder_never_leads_out_of_it(make_linked_save):
    """The list of files that an interrupted save has yet to remove is the one place where a file names files."""
    folder, outside = make_linked_save
    storage.finish_interrupted_save(folder)
    assert outside.read_text() == "mine"
    assert not list(folder.glob(".saving-*"))


@pytest.fixture
def make_linked_save(tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    folder = tmp_path / "adapter"
    (folder / ".saving-x" / "new").mkdir(parents=True)
    (folder / ".saving-x" / storage.MARK_FILE).write_text(f'["../outside.txt", "{outside}"]')
    return folder, outside
