"""The mutation score of the tests of kernels and layer: `make mutants`.

Usage: python -m tests.mutants [--jobs 2] [WORD ...]

Each mutant is one edit of a copy of the tree; it is killed when its tests fail on the copy. Exit 1 below 95 %.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tests.kernels.test_mutations import EAGER, KERNEL

ROOT = Path(__file__).parents[1]
GOAL = 0.95
OPS, KERNEL_TESTS = "hylorada_kernels/ops", "tests/kernels"


class Mutant(NamedTuple):
    name: str
    file: str
    text: str
    replacement: str
    tests: list[str]


def _of(file: str, tests: str, edits: dict[str, tuple[str, str]]) -> list[Mutant]:
    return [Mutant(f"{file}: {name}", file, *edit, shlex.split(tests)) for name, edit in edits.items()]


MUTANTS = [
    *_of(f"{OPS}/hybrid_linear/eager.py", f"{KERNEL_TESTS}/test_mutations.py -k 'originals_pass and eager'", EAGER),
    *_of(f"{OPS}/hybrid_linear/kernel.py", f"{KERNEL_TESTS}/test_mutations.py -k 'originals_pass and triton'", KERNEL),
    *_of(
        f"{OPS}/column_norm/eager.py",
        f"{KERNEL_TESTS}/test_column_norm.py -k 'not triton'",
        {
            "the mixed term counts once": ("beta=2 * scale", "beta=scale"),
            "the update's own square misses an s": ("alpha=scale**2", "alpha=scale"),
            "rows that cancel are not made anew": ("CANCELLATION = 0.3", "CANCELLATION = -1.0"),
            "dB misses an s": ("db = scale * weighted @ (a @ a.T)", "db = weighted @ (a @ a.T)"),
            "dA misses W": ("        da.addmm_(weighted[rows].T, wide)\n", ""),
            "a zero row divides by zero": ("torch.where(norm > 0, grad / norm, 0)", "grad / norm"),
        },
    ),
    *_of(
        f"{OPS}/_products.py",
        f"{KERNEL_TESTS}/test_products.py",
        {
            "the rows left over are forgotten": ("whole == rows else", "whole else"),
            "groups of columns are not turned back": ("product.movedim(0, 1).reshape", "product.reshape"),
            "a product is not scaled": ("thin, factor, beta=0, alpha=scale", "thin, factor, beta=0"),
            "nothing is taken in groups": ("BATCH_ELEMENTS = 1 << 19", "BATCH_ELEMENTS = 1 << 40"),
            "oneDNN's sum misses the bias": ("_onednn(x, weight, bias).addmm_", "_onednn(x, weight).addmm_"),
            "oneDNN's sum misses the scale": (".addmm_(thin, factor, alpha=scale)", ".addmm_(thin, factor)"),
            "oneDNN adds nothing": ('weight, None, "add")', 'weight, None, "add") - other'),
            "oneDNN is never turned off": (" and torch.backends.mkldnn.enabled", ""),
            "oneDNN is given subclasses": (
                "        and backend.is_plain(left)\n        and backend.is_plain(right)\n",
                "",
            ),
            "every processor takes oneDNN": ('return "AuthenticAMD" in description', "return True"),
        },
    ),
    *_of(
        f"{OPS}/column_norm/kernel.py",
        f"{KERNEL_TESTS}/test_column_norm.py {KERNEL_TESTS}/test_norm_cache.py -k triton",
        {
            "s is dropped": ("adapted = b_w.to(tl.float32) + scale * update", "adapted = b_w.to(tl.float32) + update"),
            "the last rank is dropped": ("            m_r = r + o_r < R\n", "            m_r = r + o_r < R - 1\n"),
            "places do not count in the fingerprint": ("offsets + first), 0)", "offsets * 0 + first), 0)"),
            "s does not count in the fingerprint": ("scale.to(tl.int32, bitcast=True)", "(scale * 0).to(tl.int32)"),
        },
    ),
    *_of(
        f"{OPS}/shifted_attention/eager.py",
        f"{KERNEL_TESTS}/test_shifted_attention.py -k 'not triton'",
        {
            "the first group is not short": ("start = min(offset, tokens)", "start = 0"),
            "every head is shifted": ("half = heads // 2", "half = 0"),
            "no sinks": ("slice(first, first + min(sink_tokens, start))", "slice(first, first)"),
            "shared heads overwrite": ("add = k.shape[1] < q.shape[1] or sink_tokens > 0", "add = sink_tokens > 0"),
            "the rest of a row is forgotten": ("    if rest:\n", "    if False:\n"),
            "dropout is not in dP": ("            dp *= factors\n", ""),
            "dropout sees the future": ("scores.masked_fill_(later,", "scores.masked_fill_(later & False,"),
        },
    ),
    *_of(
        f"{OPS}/shifted_attention/kernel.py",
        f"{KERNEL_TESTS}/test_shifted_attention.py -k 'triton and truth'",
        {
            "the sum is not rescaled": ("total = total * shrink", "total = total"),
            "a token does not see itself": ("(o_k[None, :] <= o_q[:, None])", "(o_k[None, :] < o_q[:, None])"),
            "the scale is dropped": ("scale_log2 = scale * LOG2_E", "scale_log2 = LOG2_E"),
        },
    ),
    *_of(
        "hylorada_kernels/nn.py",
        f"{KERNEL_TESTS}/test_nn.py tests/hylorada/test_model.py",
        {
            "rsLoRA scales as LoRA": ("alpha / math.sqrt(rank) if use_rslora", "alpha / rank if use_rslora"),
            "dropout in evaluation": ("self.dropout_p if self.training else 0.0", "self.dropout_p"),
            "a Conv1D is merged untransposed": ("(merged.T if self.weight_is_transposed else merged)", "(merged)"),
            "unmerge leaves the weight": ("self.weight.copy_(self._original_weight)", "pass"),
            "the bias is lost after a merge": ("return y if self.bias is None else y + self.bias", "return y"),
            "the base stays trainable": ("linear.weight.requires_grad_(False)", "linear.weight"),
            "A starts at random": ("init_lora_a(self.lora_a, init)", "nn.init.normal_(self.lora_a)"),
            "norm_grad is ignored": ("norm_grad=self.norm_grad,", "norm_grad=False,"),
        },
    ),
    *_of(
        "hylorada_kernels/norm_cache.py",
        f"{KERNEL_TESTS}/test_norm_cache.py -k 'not triton'",
        {
            "B is not compared": (" and torch.equal(kept_b, lora_b)", ""),
            "the weight is not sampled": (" and torch.equal(kept_sample, sample)", ""),
            "callers share a norm": ("given = found.number, kept[0].clone()", "given = found.number, kept[0]"),
            "a refresh looks at every layer": ("            if not groups:\n                break\n", ""),
            "layers of several scales are made together": ("(layout, layer.scale, kind)", "(layout, kind)"),
            "a refresh takes parts for the whole": ("cache._state[1] == _layout", "True or _layout"),
            "an interrupted norm is believed": ("    kept_key.zero_()\n", ""),
            "the number of a norm is not compared": (" or given[0] != found.number", ""),
            "the scale is not in the key": ("_bits(scale)]", "0]"),
            "no norm is kept": ("kept_key.copy_(torch.tensor([*found.key, number]))", "pass"),
        },
    ),
    *_of(
        "hylorada_kernels/norm_cache.py",
        f"{KERNEL_TESTS}/test_norm_cache.py -k triton",
        {
            "no norm is kept in Triton": ("kept_key.copy_(torch.tensor(key))", "pass"),
            "another weight is not noticed in Triton": ("        fingerprint.zero_()\n", ""),
        },
    ),
    *_of(
        "hylorada_kernels/layer_cache.py",
        f"{KERNEL_TESTS}/test_norm_cache.py -k 'not triton'",
        {
            "the magnitude is not compared": ("kept.copies, (magnitude, blend)", "kept.copies[1:], (blend,)"),
            "the blend is not compared": ("kept.copies, (magnitude, blend)", "kept.copies[:1], (magnitude,)"),
            "the norm is not compared": ("kept.norm is norm and ", ""),
            "layers with a blend and without are made together": (", None if blend is None else blend.dtype", ""),
            "what was refreshed is not kept": ("                cache._kept = kept\n", "                pass\n"),
            "small gains are not seen": (">= eager.SMALL_GAIN", ">= -1"),
            "the scaled weight is not asked for": (" and (kept.gain.scaled is not None) == scale_weight", ""),
        },
    ),
    *_of(
        "hylorada_kernels/layer_cache.py",
        f"{KERNEL_TESTS}/test_nn.py -k 'not triton'",
        {"the gain's parameters are not checked": ("check_operands(weight, lora_a, lora_b, magnitude, blend)", "pass")},
    ),
    *_of(
        f"{OPS}/hybrid_linear/op.py",
        f"{KERNEL_TESTS}/test_nn.py {KERNEL_TESTS}/test_hybrid_linear.py -k 'not triton'",
        {
            "a kept gain hides a trained weight": (" or weight.requires_grad:", ":"),
            "the registered op takes g z for z": ("        kept = kept.new_empty(0)\n", "        pass\n"),
            "the norm's values are not saved": (" and not needs[5]", ""),
        },
    ),
    *_of(
        "hylorada_kernels/backend.py",
        f"{KERNEL_TESTS}/test_backend.py",
        {
            "using never ends": ("_requested.reset(token)", "pass"),
            "an explicit triton falls back": ("    if obstacle:\n", "    if False:\n"),
            "any name is taken": ("if choice not in CHOICES:", "if False:"),
        },
    ),
]  # fmt: skip


def survives(mutant: Mutant) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("hylorada", "hylorada_kernels", "tests", "benchmarks", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copy(source, copy / name)
        path = copy / mutant.file
        text = path.read_text(encoding="utf-8")
        if mutant.text not in text:
            raise SystemExit(f"{mutant.name}: {mutant.text!r} is no longer there; adapt the mutant")
        path.write_text(text.replace(mutant.text, mutant.replacement), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *mutant.tests,
        ]
        environment = os.environ | {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        outcome = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if outcome.returncode not in (0, 1):
            raise SystemExit(f"{mutant.name}: pytest ended with {outcome.returncode}:\n{outcome.stdout[-2000:]}")
        # a module that cannot be imported would kill every mutant
        if outcome.returncode == 1 and not re.search(r"\d+ failed", outcome.stdout):
            raise SystemExit(f"{mutant.name}: no test ran:\n{outcome.stdout[-2000:]}")
        return outcome.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("words", nargs="*", help="only mutants with one of these in their names")
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if not arguments.words or any(word in m.name for word in arguments.words)]
    alive = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutant, is_alive in zip(chosen, tqdm(pool.map(survives, chosen), total=len(chosen)), strict=True):
            alive += is_alive
            tqdm.write(f"{'SURVIVED' if is_alive else 'killed  '} {mutant.name}")
    killed = len(chosen) - alive
    print(f"{killed} of {len(chosen)} mutants killed: {killed / len(chosen):.1%} ({GOAL:.0%} is the goal)")
    return 0 if killed >= GOAL * len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
