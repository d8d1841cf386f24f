"""Compare fine-tuning methods on one model and one text: held-out perplexity before and after, time, memory.

    python benchmarks/run_benchmark.py --methods baseline lora dora hylorada --steps 30

Every method runs in a process of its own, from the same weights, on the same layers and the same batches.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import logging
import multiprocessing
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hylorada.baselines import METHODS, baseline_config, get_baseline_model
from hylorada.config import HyLoRADAConfig
from hylorada.data import Block, Document, load_documents, make_dataloader, pad_token_id, split_documents, token_blocks
from hylorada.evaluation import evaluate_perplexity
from hylorada.memory import PeakMemory, peak_memory
from hylorada.model import HyLoRADAModel
from hylorada.pretrained import SMOLLM2, load_pretrained
from hylorada.provenance import provenance
from hylorada.report import comparison_table, write_report
from hylorada.s2_attention import SMALLEST_AUTO_GROUP
from hylorada.sparse import find_mlp_outputs
from hylorada.trainer import HyLoRADATrainer, StepRecord, TrainingConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TRAINING_FLAGS = {
    "num_epochs": "--epochs",
    "max_steps": "--steps",
    "per_device_batch_size": "--batch_size",
    "gradient_accumulation_steps": "--grad_accum",
    "learning_rate": "--lr",
    "lr_scheduler": "--lr_scheduler",
    "warmup_ratio": "--warmup_ratio",
    "seed": "--seed",
}


@dataclass(frozen=True)
class Comparison:
    """What all methods of one run share."""

    model: str
    dtype: str
    max_length: int
    overrides: dict[str, Any]
    rates: dict[str, float]
    training: TrainingConfig
    train_blocks: list[Block]
    test_blocks: list[Block]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        _run(options)
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        print(f"run_benchmark: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    overrides = _overrides(options)
    # a name or a value that no method takes shows before anything is downloaded
    configs = {method: baseline_config(method, **overrides) for method in options.methods}
    rates = _learning_rates(options.lr, [method for method in options.methods if method != "baseline"])
    for rate in (*rates.values(), TrainingConfig.learning_rate):
        _training_config(options, rate)
    documents = load_documents(options.dataset)
    model, tokenizer = load_pretrained(options.model, DTYPES[options.dtype])
    # likewise what the model rules out, or an option that all methods share, before anything is measured
    if "sparse" in options.methods:
        find_mlp_outputs(model)
    for config in [config for config in configs.values() if config is not None][-1:]:
        HyLoRADAModel(model, config)
    comparison, data = _prepare(options, documents, tokenizer, overrides, rates)
    settings = {"dtype": options.dtype, **overrides, **dataclasses.asdict(comparison.training)}
    # each row has its own
    del settings["learning_rate"], settings["seed"]
    facts = {**provenance(), "model": options.model, "data": data, "settings": settings, "seed": options.seed}
    directory = _make_directory(Path(options.output_dir), datetime.now())

    rows: list[dict[str, Any]] = []
    for number, method in enumerate(options.methods, start=1):
        print(f"\n[{number}/{len(options.methods)}] {method}", flush=True)
        measured = _in_own_process(comparison, method)
        rows.append({"method": method, **measured, **facts})
        # after every method, so that a later failure leaves what was measured
        paths = write_report(rows, directory)
    print(f"\n{comparison_table(rows)}\n")
    print("\n".join(str(path) for path in paths))


def _make_directory(parent: Path, now: datetime) -> Path:
    """Make a folder named after the time; runs that start in one second are numbered from the second on."""
    name = now.strftime("%Y-%m-%dT%H-%M-%S")
    for number in itertools.count(1):
        directory = parent / (name if number == 1 else f"{name}-{number}")
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory
    raise AssertionError


def _prepare(
    options: argparse.Namespace,
    documents: list[Document],
    tokenizer: Any,
    overrides: dict[str, Any],
    rates: dict[str, float],
) -> tuple[Comparison, dict[str, Any]]:
    train_documents, test_documents = split_documents(documents)
    if options.validation:
        train_documents, test_documents = split_documents(train_documents, seed=1)
    train_blocks = token_blocks(train_documents, tokenizer, options.max_length, options.num_train)
    test_blocks = token_blocks(test_documents, tokenizer, options.max_length, options.num_test)
    comparison = Comparison(
        model=options.model,
        dtype=options.dtype,
        max_length=options.max_length,
        overrides=overrides,
        rates=rates,
        training=_training_config(options, TrainingConfig.learning_rate),
        train_blocks=train_blocks,
        test_blocks=test_blocks,
    )
    data = {
        "name": options.dataset,
        "held out": "validation" if options.validation else "test",
        "max_length": options.max_length,
        "train documents": len(train_documents),
        "train blocks": len(train_blocks),
        "held-out documents": len(test_documents),
        "held-out blocks": len(test_blocks),
        "held-out tokens": sum(len(block["input_ids"]) - 1 for block in test_blocks),
    }
    return comparison, data


def _in_own_process(comparison: Comparison, method: str) -> dict[str, Any]:
    # a fresh process: its peak memory is the method's, and no method inherits another one's state
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(run_method, comparison, method).result()


def run_method(comparison: Comparison, method: str) -> dict[str, Any]:
    """Evaluate one method, train it, evaluate it again; return what was measured."""
    torch.manual_seed(comparison.training.seed)
    base, tokenizer = load_pretrained(comparison.model, DTYPES[comparison.dtype])
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    model = get_baseline_model(method, base, **comparison.overrides)

    with peak_memory() as peak:
        before = _perplexity(model, tokenizer, comparison)
    if method == "baseline":
        return _measurements(0, None, before, before, peak, [])

    training = dataclasses.replace(comparison.training, learning_rate=comparison.rates[method])
    batch_size = training.per_device_batch_size or 1
    loader = make_dataloader(comparison.train_blocks, batch_size, pad_token_id(tokenizer), shuffle=True)
    with peak_memory() as peak:
        result = HyLoRADATrainer(model=model, train_dataloader=loader, config=training).train()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    after = _perplexity(model, tokenizer, comparison)
    return _measurements(trainable, training.learning_rate, before, after, peak, result.steps)


def _perplexity(model: nn.Module, tokenizer: Any, comparison: Comparison) -> float:
    perplexity, _ = evaluate_perplexity(
        model=model,
        dataset=comparison.test_blocks,
        tokenizer=tokenizer,
        max_length=comparison.max_length,
        show_progress=True,
    )
    return perplexity


def _measurements(
    trainable_parameters: int,
    learning_rate: float | None,
    before: float,
    after: float,
    peak: PeakMemory,
    steps: list[StepRecord],
) -> dict[str, Any]:
    return {
        "trainable_parameters": trainable_parameters,
        "learning_rate": learning_rate,
        "perplexity_before": before,
        "perplexity_after": after,
        "seconds_per_step": statistics.median(record.seconds for record in steps) if steps else None,
        "peak_memory_mib": peak.mib,
        "peak_memory_source": peak.source,
        "steps": [dataclasses.asdict(record) for record in steps],
    }


def _learning_rates(given: Sequence[str], methods: Sequence[str]) -> dict[str, float]:
    """Return each method's learning rate, out of one rate for all or of one "method=rate" for each."""
    if len(given) == 1 and "=" not in given[0]:
        return dict.fromkeys(methods, _rate(given[0]))
    pairs = dict(text.partition("=")[::2] for text in given)
    if set(pairs) != set(methods):
        raise ValueError(f"--lr takes one rate, or method=rate for each of {', '.join(methods)}; got {' '.join(given)}")
    return {method: _rate(rate) for method, rate in pairs.items()}


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--lr takes numbers, such as 2e-4 or lora=2e-4; got {text!r}") from None


def _training_config(options: argparse.Namespace, learning_rate: float) -> TrainingConfig:
    fields = {field: getattr(options, flag[2:]) for field, flag in TRAINING_FLAGS.items() if flag != "--lr"}
    try:
        # the weights' own precision rules: dtype
        return TrainingConfig(**fields, learning_rate=learning_rate, mixed_precision="fp32")
    except (ValueError, TypeError) as error:
        flag = TRAINING_FLAGS[str(error).split()[0]]
        raise ValueError(f"{flag}: {error}") from error


def _overrides(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of HyLoRADAConfig that every method shares."""
    if options.sink_tokens and not options.s2_attn:
        raise ValueError(f"--sink_tokens {options.sink_tokens} needs --s2_attn, whose groups see those tokens")
    if options.s2_group_size is not None and not options.s2_attn:
        raise ValueError(f"--s2_group_size {options.s2_group_size} needs --s2_attn, which makes the groups")
    overrides: dict[str, Any] = {
        "lora_rank": options.lora_rank,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "s2_attn_enabled": options.s2_attn,
        "s2_sink_tokens": options.sink_tokens,
        "train_embeddings": options.train_embeddings,
        "train_norms": options.train_norms,
        "rope_scaling_type": options.rope_scaling_type,
        "rope_scaling_factor": options.rope_scaling_factor,
        "gradient_checkpointing": options.gradient_checkpointing,
    }
    if options.s2_attn:
        size = HyLoRADAConfig.s2_group_size if options.s2_group_size is None else options.s2_group_size
        _check_groups(size, options.max_length)
        overrides["s2_group_size"] = size
    if options.target_modules:
        overrides["lora_target_modules"] = tuple(options.target_modules)
    return overrides


def _check_groups(group_size: int | str, max_length: int) -> None:
    # the first border of a shifted layer
    tokens = SMALLEST_AUTO_GROUP if isinstance(group_size, str) else group_size
    shift = round(HyLoRADAConfig.s2_shift_ratio * tokens)
    if max_length <= shift:
        raise ValueError(
            f"--s2_attn changes nothing at --max_length {max_length}: with --s2_group_size {group_size} the first "
            f"border of a group is after {shift} tokens; give a longer --max_length or a smaller --s2_group_size"
        )


def _group_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=SMOLLM2, help=f'"{SMOLLM2}" (default), a directory with a saved model, or the id of a hub')
    add("--dtype", choices=DTYPES, default="fp32", help="of the base model's weights; adapters are always fp32")
    add("--methods", nargs="+", default=["baseline", "lora", "dora", "hylorada"], help=f"of {', '.join(METHODS)}")
    add("--dataset", default="kjv", help='"kjv" (default), or the path of text files')
    add("--max_length", type=int, default=512, help="tokens of a block, in training and in evaluation")
    add("--num_train", type=int, help="training blocks, evenly spread; default: all")
    add("--num_test", type=int, default=64, help="held-out blocks, evenly spread")
    add("--validation", action="store_true", help="hold out training documents instead: to choose settings")
    add("--epochs", type=int, default=1)
    add("--steps", type=int, help="optimizer steps, in place of --epochs")
    add("--batch_size", type=int, default=1)
    add("--grad_accum", type=int, default=1, help="batches of one optimizer step")
    add("--lr", nargs="+", default=["2e-4"], help="of every method, or by method: --lr lora=4e-3 hylorada=1e-3")
    add("--lr_scheduler", default="linear", help="a name of transformers' schedules")
    add("--warmup_ratio", type=float, default=0.1)
    add("--seed", type=int, default=0, help="of initial values, dropout and the order of the data")
    add("--lora_rank", type=int, default=8)
    add("--lora_alpha", type=float, default=16.0)
    add("--lora_dropout", type=float, default=0.05)
    add("--target_modules", nargs="+", help="names of the layers to adapt; default: HyLoRADAConfig's")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--s2_attn", action="store_true", help="train with shifted sparse attention; evaluation has full attention")
    add("--s2_group_size", type=_group_size, help='tokens of a group of --s2_attn, or "auto"; default: 2048')
    add("--sink_tokens", type=int, default=0, help="tokens that every group of --s2_attn sees")
    add("--train_embeddings", nargs="?", const=True, default=False, choices=("positions", "tokens", "all"))
    add("--train_norms", action="store_true")
    add("--rope_scaling_type", choices=("linear", "dynamic", "yarn", "auto"), help='"auto" extends position tables too')
    add("--rope_scaling_factor", type=float, default=1.0, help="target length / original length")
    add("--output_dir", default="results", help="a folder named after the time is made in it")
    return parser


if __name__ == "__main__":
    sys.exit(main())
