"""The properties on many more random cases than the tests take: `make fuzz`, which writes docs/fuzzing.md.

Usage: python -m tests.properties.fuzz [--share 0.1] [--processes 2] [--seed 0]
"""

import argparse
import logging
import platform
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tqdm import tqdm

from hylorada_kernels import testing
from tests.properties.properties import (
    attention_cases,
    check_attention,
    check_linear,
    check_model,
    check_norm,
    linear_cases,
    model_cases,
)

PAGE = Path(__file__).parents[2] / "docs" / "fuzzing.md"
CHUNK = 500
TRITON = [torch.float32, torch.float16, torch.bfloat16]
ROUTES = st.sampled_from(["fused", "one_pass", "library"])

FOUND = """
## What was found

- The eager column norm lost digits where the terms of B A cancel (dependent rows of A): now made anew for such rows;
  `test_norm_survives_cancellation_within_the_update`.
- RoPE scaling of a plain LoRA was lost on the way through a PEFT export, as no tensor stood for it;
  `test_parts_without_tensors_come_back_from_an_export`.
- Beyond the budgets of the tests of the ops a drawn case is granted the rounding of a norm whose terms cancel, of a
  beta near 1, and of results of few values; in Triton also what a large bias hides of a kept output. Each has its
  smallest case in `tests/properties/test_properties.py`. In 64 bits the sums of the truth round too.
- Of the gradients of v, sinks carry nearly all of the norm, and are rounded twice: a drawn case of attention is granted
  so many roundings as there are values that carry it; `test_sinks_carry_the_norm_of_a_gradient_alone`.
"""

# name: (the cases, the check of one, how many, kind)
PROPERTIES = {
    "hybrid_linear, eager": (linear_cases(), lambda case: check_linear(*case), 25_000, "eager"),
    "column_norm, eager": (linear_cases(), lambda case: check_norm(case[0]), 55_000, "eager"),
    "shifted_attention, eager": (attention_cases(), check_attention, 20_000, "eager"),
    "hybrid_linear, interpreted": (
        st.tuples(linear_cases(TRITON), ROUTES),
        lambda case: check_linear(*case[0], backend="triton", route=case[1]),
        650,
        "interpreted",
    ),
    "column_norm, interpreted": (
        linear_cases(TRITON),
        lambda case: check_norm(case[0], "triton"),
        800,
        "interpreted",
    ),
    "shifted_attention, interpreted": (
        attention_cases(TRITON),
        lambda case: check_attention(case, "triton"),
        600,
        "interpreted",
    ),
    "whole models": (model_cases(), check_model, 2_000, "whole model"),
}


def run_chunk(name: str, number: int, count: int) -> tuple[str, int, float, str]:
    """-> the property's name, the cases run, seconds of CPU time, the smallest failing case or ""."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    strategy, check, _, kind = PROPERTIES[name]
    if kind == "interpreted":
        testing.interpret()
    done = 0

    @seed(number)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    @given(strategy)
    def holds(case):
        nonlocal done
        done += 1
        check(case)

    start, failure = time.process_time(), ""
    try:
        holds()
    except Exception:
        failure = traceback.format_exc()[-4000:]
    return name, done, time.process_time() - start, failure


def page(totals: dict[str, list[float]], failures: list[tuple[str, str]], arguments: argparse.Namespace) -> str:
    lines = [
        "# Fuzzing",
        "",
        "What must hold for every input (`tests/properties/properties.py`), on random shapes, strides, dtypes, flags "
        "and models. Written by `make fuzz`; the tests run the same checks on a fixed few hundred cases.",
        "",
        "| property | cases | failures | CPU time |",
        "|---|---|---|---|",
    ]
    for name, (cases, seconds) in totals.items():
        failed = sum(failure[0] == name for failure in failures)
        lines.append(f"| {name} | {int(cases):,} | {failed} | {seconds:.0f} s |")
    for kind in dict.fromkeys(entry[3] for entry in PROPERTIES.values()):
        total = sum(int(totals[name][0]) for name, entry in PROPERTIES.items() if entry[3] == kind and name in totals)
        lines.append(f"| **all {kind}** | {total:,} | | |")
    installed = ", ".join(f"{package} {version(package)}" for package in ("torch", "triton", "transformers"))
    lines += [
        "",
        f"Seed {arguments.seed}; {installed}; Python {platform.python_version()}, {platform.machine()}. A chunk of "
        "cases that fails counts as one failure, and its cases include those of the search for the smallest one.",
    ]
    return "\n".join(lines) + "\n" + FOUND


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the full number of cases")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PAGE)
    arguments = parser.parse_args()
    chunks = []
    for name, (_, _, cases, kind) in PROPERTIES.items():
        size = CHUNK if kind == "eager" else CHUNK // 20
        for start in range(0, round(cases * arguments.share), size):
            chunks.append((name, start, size))
    # a bit of every property early on
    chunks.sort(key=lambda chunk: chunk[1] / PROPERTIES[chunk[0]][2])
    totals: dict[str, list[float]] = {name: [0, 0.0] for name in PROPERTIES}
    failures: list[tuple[str, str]] = []
    with ProcessPoolExecutor(arguments.processes) as pool:
        running = [pool.submit(run_chunk, name, arguments.seed + start, size) for name, start, size in chunks]
        for future in tqdm(as_completed(running), total=len(running), unit="chunk"):
            name, cases, seconds, failure = future.result()
            totals[name][0] += cases
            totals[name][1] += seconds
            if failure:
                failures.append((name, failure))
                tqdm.write(f"{name}:\n{failure}", file=sys.stderr)
            arguments.output.parent.mkdir(exist_ok=True)
            arguments.output.write_text(page(totals, failures, arguments), encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
