"""Runs everything that needs a GPU in one go, and writes one result file named after the GPU.

    python -m benchmarks.gpu_kit test      parity of the ops on the GPU in each dtype; compute-sanitizer where installed
    python -m benchmarks.gpu_kit bench     autotuning, then every microbenchmark that the installed packages allow

The exit status is 0 only if there is a GPU, every step succeeded, and each step of pytest passed at least one test.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from hylorada.provenance import provenance

PYTEST = [sys.executable, "-m", "pytest", "-n", "0", "-q"]
BENCHMARKS = ("bench_column_norm.py", "bench_layer_steps.py", "bench_shifted_attention.py")
Step = tuple[str, list[str]]


def steps_of(job: str) -> list[Step]:
    """Name and command of each step; a step of pytest gets the report's path appended."""
    if job == "bench":
        return [
            ("autotune", [sys.executable, "-m", "hylorada_kernels", "tune"]),
            *((name.removesuffix(".py"), [*PYTEST, f"benchmarks/{name}"]) for name in BENCHMARKS),
        ]
    steps = [("parity", [*PYTEST, "-m", "gpu", "tests"])]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer:
        options = ["--error-exitcode", "1", "--target-processes", "all"]
        steps.append(
            ("compute-sanitizer", [sanitizer, *options, *PYTEST, "-m", "gpu", "tests/kernels", "-k", "gradients"])
        )
    return steps


def result_file(directory: Path, job: str, gpu: str) -> Path:
    """<directory>/<the GPU's name, with dashes for what no file's name should hold>-<job>.json"""
    return directory / f"{'-'.join(''.join(c if c.isalnum() else ' ' for c in gpu).split())}-{job}.json"


def run_step(name: str, command: list[str]) -> dict[str, Any]:
    """Run one step; its exit status, seconds, counts of tests where it has any, and the tables that it wrote."""
    with tempfile.TemporaryDirectory() as scratch:
        report, tables = Path(scratch, "report.xml"), Path(scratch, "tables")
        is_pytest = "pytest" in command
        more = [f"--junitxml={report}"] if is_pytest else []
        if any(part.startswith("benchmarks/") for part in command):
            more.append(f"--results={tables}")
        begun = time.perf_counter()
        status = subprocess.run([*command, *more], env=os.environ | {"HYLORADA_REQUIRE_GPU": "1"}).returncode
        outcome: dict[str, Any] = {"step": name, "status": status, "seconds": round(time.perf_counter() - begun, 1)}
        if is_pytest:
            outcome |= counts(report)
        if tables.is_dir():
            outcome["tables"] = {
                path.stem: json.loads(path.read_text())["rows"] for path in sorted(tables.glob("*.json"))
            }
    return outcome


def counts(report: Path) -> dict[str, int]:
    """Tests that passed, failed and were skipped, from pytest's report; none without one."""
    if not report.is_file():
        return {"passed": 0, "failed": 0, "skipped": 0}
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def succeeded(outcomes: list[dict[str, Any]]) -> bool:
    """Whether something ran, nothing failed, and no step of pytest skipped all of its tests."""
    return bool(outcomes) and all(outcome["status"] == 0 and outcome.get("passed", 1) > 0 for outcome in outcomes)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 with the reason on stderr."""
    parser = argparse.ArgumentParser(prog="gpu_kit", description=__doc__.partition("\n")[0])
    parser.add_argument("job", choices=("test", "bench"))
    parser.add_argument("--output_dir", type=Path, default=Path("results/gpu"))
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("nothing ran: torch sees no CUDA device on this machine", file=sys.stderr)
        return 1
    outcomes = [run_step(name, command) for name, command in steps_of(given.job)]
    path = result_file(given.output_dir, given.job, torch.cuda.get_device_name())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), "steps": outcomes}, indent=1) + "\n", encoding="utf-8")
    for outcome in outcomes:
        print({name: value for name, value in outcome.items() if name != "tables"})
    print(f"written to {path}")
    if not succeeded(outcomes):
        print("a step failed, or ran no test", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
