"""The wheel and the sdist are whole, install into an empty environment, and import quickly."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ("hylorada", "hylorada_kernels", "pyproject.toml", "setup.py", "README.md", "LICENSE")
PACKAGES = ("hylorada", "hylorada_kernels")


def run(*command: str | Path, cwd: Path) -> str:
    outcome = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what ships, so that nothing built lies in the tree, and nothing old in the build."""
    folder = tmp_path_factory.mktemp("source")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def build_wheel(source: Path, into: Path) -> Path:
    if int(importlib.metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building without network needs setuptools 77 or newer beside the tests")
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", into, ".", cwd=source)
    (wheel,) = into.glob("*.whl")
    return wheel


def files_of(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for package in PACKAGES
        for path in (folder / package).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.mark.slow
def test_the_wheel_out_of_the_sdist_holds_every_file_of_both_packages(source, tmp_path):
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", code, cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    wheel = build_wheel(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    held = {name for name in names if ".dist-info/" not in name}
    expected = files_of(ROOT)
    assert {f"{package}/py.typed" for package in PACKAGES} <= expected
    assert held == expected


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment_and_adapts_a_layer(source, tmp_path):
    wheel = build_wheel(source, tmp_path / "wheel")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    (packages,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    # the dependencies of the tests' environment by path: the .pth of an editable installation there is not read
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    code = """
import torch, hylorada, hylorada_kernels
linear = torch.nn.Linear(12, 7)
x = torch.randn(5, 12)
torch.testing.assert_close(hylorada_kernels.HybridLinear.from_linear(linear, rank=3)(x), linear(x))
print(hylorada.__file__, hylorada_kernels.__file__, hylorada.HyLoRADAModel.__module__)
"""
    told = run(python, "-I", "-c", code, cwd=tmp_path).split()
    assert told == [*(str(packages / package / "__init__.py") for package in PACKAGES), "hylorada.model"]
    assert "train" in run(tmp_path / "venv/bin/hylorada", "--help", cwd=tmp_path)


def test_importing_takes_under_2_seconds_beyond_torch_and_transformers(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import torch, transformers
begun = time.process_time()
import hylorada, hylorada_kernels
print(time.process_time() - begun)
"""
    # processor time, which other programs on the machine do not lengthen
    seconds = float(run(sys.executable, "-c", code, cwd=tmp_path))
    assert seconds < 2


def test_the_version_is_stated_once_more_only_where_it_agrees():
    stated = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    import hylorada_kernels

    assert stated and stated[1] == hylorada_kernels.__version__
