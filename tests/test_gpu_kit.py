"""The runner of what needs a GPU, as far as a machine without one can tell: what it collects, names and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_kit
from hylorada_kernels import doctor

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("job", ["test", "bench"])
def test_without_a_gpu_it_fails_and_writes_nothing(tmp_path, capsys, job):
    assert gpu_kit.main([job, "--output_dir", str(tmp_path)]) == 1
    assert "nothing ran: torch sees no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_result_is_named_after_the_gpu():
    path = gpu_kit.result_file(Path("results"), "bench", "NVIDIA H100 80GB HBM3 (SXM)/x")
    assert path == Path("results/NVIDIA-H100-80GB-HBM3-SXM-x-bench.json")


def test_every_step_names_files_that_exist():
    for job in ("test", "bench"):
        for _, command in gpu_kit.steps_of(job):
            named = [part for part in command if part.startswith(("tests", "benchmarks/"))]
            assert all((ROOT / part).exists() for part in named)


def outcome(tmp_path, monkeypatch, source):
    monkeypatch.delenv("HYLORADA_REQUIRE_GPU", raising=False)
    test = tmp_path / "test_it.py"
    test.write_text(source)
    return gpu_kit.run_step("it", [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(test)])


def test_all_skipped_is_red(tmp_path, monkeypatch):
    found = outcome(tmp_path, monkeypatch, "import pytest\ndef test_a(): pytest.skip('no GPU')\n")
    assert (found["status"], found["passed"], found["skipped"]) == (0, 0, 1)
    assert not gpu_kit.succeeded([found])


def test_one_passed_is_green_and_one_failed_is_red(tmp_path, monkeypatch):
    good = outcome(tmp_path, monkeypatch, "def test_a(): pass\n")
    assert (good["status"], good["passed"], good["failed"]) == (0, 1, 0) and gpu_kit.succeeded([good])
    bad = outcome(tmp_path, monkeypatch, "def test_a(): pass\ndef test_b(): assert 0\n")
    assert (bad["passed"], bad["failed"]) == (1, 1) and not gpu_kit.succeeded([good, bad])
    assert not gpu_kit.succeeded([])


def test_the_file_holds_every_step(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(gpu_kit, "provenance", lambda: {"commit": "abc"})
    monkeypatch.setattr(gpu_kit, "steps_of", lambda job: [("ok", [sys.executable, "-c", ""])])
    assert gpu_kit.main(["test", "--output_dir", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "A-GPU-test.json").read_text())
    assert written["commit"] == "abc" and [step["step"] for step in written["steps"]] == ["ok"]
    monkeypatch.setattr(gpu_kit, "steps_of", lambda job: [("no", [sys.executable, "-c", "raise SystemExit(3)"])])
    assert gpu_kit.main(["test", "--output_dir", str(tmp_path)]) == 1


def test_doctor_says_which_path_each_op_takes():
    command = [sys.executable, "-m", "hylorada_kernels", "doctor"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert f"torch    {torch.__version__}" in found
    for op in ("column_norm", "hybrid_linear", "shifted_attention"):
        for dtype in ("float32", "float16", "bfloat16", "float64"):
            assert any(line.startswith(op) and f" {dtype} " in line for line in found.splitlines())
    if not torch.cuda.is_available():
        assert "gpu      none" in found and found.count("on cpu: eager, ") == 12


@pytest.mark.parametrize(("has_onednn", "library"), [(True, "oneDNN"), (False, "PyTorch's BLAS")])
def test_doctor_says_by_what_fp32_products_are_made(has_onednn, library, monkeypatch):
    monkeypatch.setattr(doctor._products, "has_quicker_onednn", lambda: has_onednn)
    assert any(line.startswith("cpu ") and line.endswith(f"by {library}") for line in doctor.findings())
