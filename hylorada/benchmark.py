"""The comparison of fine-tuning methods on one model and one text: its runs, one after another, in one report."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from .baselines import unused_fields
from .comparison import Arm, Comparison, check_groups, declare_length, run_in_own_process
from .data import Document, load_documents, pad_token_id, split_documents, token_blocks
from .model import HyLoRADAModel
from .position_table import table_length
from .pretrained import DTYPES, load_pretrained
from .provenance import provenance
from .report import comparison_table, difference_table, searches_record, write_report
from .sparse_mlp import find_mlp_outputs
from .trainer import DivergedError, TrainingConfig

logger = logging.getLogger(__name__)

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


def run(options: argparse.Namespace) -> str:
    """Compare methods. options: of `benchmark_parser`. -> the tables and the report's files, to show."""
    return compare(options, [Arm(name, name) for name in options.methods])


def compare(options: argparse.Namespace, arms: list[Arm], reference: str | None = None) -> str:
    """Run every arm with every seed, and write the report after each. -> the tables and the report's files, to show.

    reference: the arm that the others are compared with; default: the first that is trained
    """
    shared = shared_fields(options, arms)
    # a name or a value that no arm takes shows before anything is downloaded
    for arm in arms:
        check_groups(arm, shared, options.max_length)
    trained = [arm.name for arm in arms if arm.is_trained]
    rates = _learning_rates(options.lr, trained)
    grid = [_rate(text, "--lr_grid") for text in options.lr_grid or []]
    for rate in (*rates.values(), *grid, TrainingConfig.learning_rate):
        for seed in options.seeds:
            _training_config(options, rate, seed)
    documents = load_documents(options.dataset)
    model, tokenizer = load_pretrained(options.model, DTYPES[options.dtype])
    # likewise what the model rules out, or an option that all arms share, before anything is measured
    declare_length(model, options.original_length)
    shared |= _longer_table(model, options)
    if any(arm.method == "sparse" for arm in arms):
        find_mlp_outputs(model)
    for config in [config for arm in arms if (config := arm.config(shared)) is not None][-1:]:
        HyLoRADAModel(model, config)
    del model

    comparison, data = _prepare(options, documents, tokenizer, shared)
    search = _prepare(options, documents, tokenizer, shared, validation=True)[0] if grid else None
    facts = {**provenance(), "model": options.model, "data": data, "settings": _settings(options, shared)}
    directory = _make_directory(Path(options.output_dir), datetime.now())
    searches = _search_rates(search, arms, grid, options.seeds[0], directory / "search.json") if search else {}
    rates |= {name: min(losses, key=losses.__getitem__) for name, losses in searches.items()}

    for arm in arms:
        for name, value in arm.decided(shared).items():
            logger.info("%s decides %s=%r itself; the flag is for the others", arm.name, name, value)
        for name, value in unused_fields(arm.method, shared).items():
            logger.info("%s has no use for %s=%r; the flag is for the others", arm.name, name, value)
    rows: list[dict[str, Any]] = []
    before: dict[str, list[float]] = {}
    # an arm that is not trained is the same for all seeds
    runs = [(seed, arm) for seed in options.seeds for arm in arms if arm.is_trained or seed == options.seeds[0]]
    for number, (seed, arm) in enumerate(runs, start=1):
        logger.info("[%d/%d] %s, seed %d", number, len(runs), arm.name, seed)
        measured = _run(comparison, arm, rates.get(arm.name), seed, before.get(arm.name))
        before[arm.name] = measured["losses_before"]
        rows.append({"method": arm.name, "meaning": arm.meaning, "seed": seed, **measured, **facts})
        # after every run, so that a later failure leaves what was measured
        paths = write_report(rows, directory, searches, reference)
    tables = [comparison_table(rows), difference_table(rows, reference)]
    return "\n\n".join([*(table for table in tables if table), "\n".join(str(path) for path in paths)])


# a name of this module's own, so that a test can put something faster in its place
_run = run_in_own_process


def _search_rates(
    comparison: Comparison, arms: list[Arm], grid: list[float], seed: int, path: Path
) -> dict[str, dict[float, float]]:
    """Return each trained arm's validation perplexity by learning rate."""
    found: dict[str, dict[float, float]] = {}
    trained = [arm for arm in arms if arm.is_trained]
    for number, (arm, rate) in enumerate(itertools.product(trained, grid), start=1):
        logger.info("[search %d/%d] %s, learning rate %g", number, len(trained) * len(grid), arm.name, rate)
        # what the model is before training is not asked here
        try:
            measured = _run(comparison, arm, rate, seed, [math.nan] * len(comparison.test_rows))
            perplexity = measured["perplexity_after"]
        except DivergedError as error:
            logger.warning("%s is out: %s", arm.name, error)
            perplexity = math.inf
        found.setdefault(arm.name, {})[rate] = perplexity
        path.write_text(json.dumps(searches_record(found), indent=1) + "\n", encoding="utf-8")
    for name, losses in found.items():
        if not math.isfinite(min(losses.values())):
            raise ValueError(f"--lr_grid: {name} diverges at every rate of {', '.join(map('{:g}'.format, grid))}")
    return found


def _longer_table(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """The fields that make a learned position table as long as the texts, which no arm could read otherwise."""
    length = table_length(model)
    if length is None:
        return {}
    reached = round(length * options.rope_scaling_factor)
    if options.max_length <= reached:
        return {}
    factor = options.max_length / length
    if options.rope_scaling_type is not None:
        raise ValueError(
            f"--max_length {options.max_length}: --rope_scaling_factor {options.rope_scaling_factor:g} takes the "
            f"{length} learned positions of {options.model} to {reached}; give {factor:g} or more, or a shorter "
            "--max_length"
        )
    logger.info(
        "%s has %d learned positions: its table is made longer for every method, as by --rope_scaling_type auto "
        "--rope_scaling_factor %g",
        options.model,
        length,
        factor,
    )
    return {"rope_scaling_type": "auto", "rope_scaling_factor": factor}


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
    shared: dict[str, Any],
    validation: bool = False,
) -> tuple[Comparison, dict[str, Any]]:
    validation = validation or options.validation
    train_documents, test_documents = split_documents(documents)
    if validation:
        train_documents, test_documents = split_documents(train_documents, seed=1)
    is_author = options.protocol == "author"
    make_rows = _line_rows if is_author else token_blocks
    comparison = Comparison(
        model=options.model,
        dtype=options.dtype,
        original_length=options.original_length,
        shared=shared,
        training=_training_config(options, TrainingConfig.learning_rate, options.seeds[0]),
        train_rows=make_rows(train_documents, tokenizer, options.max_length, options.num_train),
        test_rows=make_rows(test_documents, tokenizer, options.max_length, options.num_test),
        by_row=is_author,
    )
    if is_author:
        padding = pad_token_id(tokenizer)
        for row in comparison.train_rows:
            row["input_ids"].extend([padding] * (options.max_length - len(row["input_ids"])))  # type: ignore[index]
    data = {
        "name": options.dataset,
        "held out": "validation" if validation else "test",
        "rows": "lines, in training padded with learned padding" if is_author else "blocks of a document",
        "max_length": options.max_length,
        "train documents": len(train_documents),
        "train rows": len(comparison.train_rows),
        "held-out documents": len(test_documents),
        "held-out rows": len(comparison.test_rows),
        "held-out tokens": sum(comparison.test_tokens),
    }
    return comparison, data


def _line_rows(
    documents: Sequence[Document], tokenizer: Any, max_length: int, limit: int | None
) -> list[dict[str, Any]]:
    """Return the first lines with at least two tokens, each cut to max_length."""
    lines = (line.strip() for document in documents for line in document.text.split("\n"))
    encoded = (tokenizer(line, verbose=False)["input_ids"][:max_length] for line in lines if line)
    rows = [{"input_ids": ids} for ids in itertools.islice((ids for ids in encoded if len(ids) > 1), limit)]
    if not rows:
        raise ValueError("the documents hold no line of at least 2 tokens")
    return rows


def _settings(options: argparse.Namespace, shared: dict[str, Any]) -> dict[str, Any]:
    training = vars(_training_config(options, TrainingConfig.learning_rate, options.seeds[0])).copy()
    # each row has its own
    del training["learning_rate"], training["seed"]
    chosen = {"protocol": options.protocol, "dtype": options.dtype, "original_length": options.original_length}
    return chosen | shared | training


def _learning_rates(given: Sequence[str], arms: Sequence[str]) -> dict[str, float]:
    """Return each arm's learning rate, out of one rate for all or of one "arm=rate" for each."""
    if len(given) == 1 and "=" not in given[0]:
        return dict.fromkeys(arms, _rate(given[0]))
    pairs = dict(text.partition("=")[::2] for text in given)
    if set(pairs) != set(arms):
        raise ValueError(f"--lr takes one rate, or method=rate for each of {', '.join(arms)}; got {' '.join(given)}")
    return {arm: _rate(rate) for arm, rate in pairs.items()}


def _rate(text: str, flag: str = "--lr") -> float:
    try:
        return float(text)
    except ValueError:
        example = "such as 2e-4 or lora=2e-4" if flag == "--lr" else "such as 1e-3 2e-3"
        raise ValueError(f"{flag} takes numbers, {example}; got {text!r}") from None


def _training_config(options: argparse.Namespace, learning_rate: float, seed: int) -> TrainingConfig:
    given = {flag[2:]: getattr(options, flag[2:]) for flag in TRAINING_FLAGS.values() if flag not in ("--lr", "--seed")}
    fields = {field: given[flag[2:]] for field, flag in TRAINING_FLAGS.items() if flag[2:] in given}
    try:
        # the weights' own precision rules: dtype
        return TrainingConfig(**fields, learning_rate=learning_rate, seed=seed, mixed_precision="fp32")
    except (ValueError, TypeError) as error:
        flag = TRAINING_FLAGS[str(error).split()[0]]
        raise ValueError(f"{flag}: {error}") from error


def shared_fields(options: argparse.Namespace, arms: Sequence[Arm]) -> dict[str, Any]:
    """Return the fields of HyLoRADAConfig that all arms share, as far as their methods leave them open."""
    shared: dict[str, Any] = {
        "lora_rank": options.lora_rank,
        "lora_alpha": options.lora_alpha,
        "lora_dropout": options.lora_dropout,
        "s2_attn_enabled": options.s2_attn,
        "train_embeddings": options.train_embeddings,
        "train_norms": options.train_norms,
        "rope_scaling_type": options.rope_scaling_type,
        "gradient_checkpointing": options.gradient_checkpointing,
    }
    if options.rope_scaling_type is not None:
        shared["rope_scaling_factor"] = options.rope_scaling_factor
    for flag, default in (("--rope_scaling_factor", 1.0), ("--original_length", None)):
        value = getattr(options, flag[2:])
        if options.rope_scaling_type is None and value != default:
            raise ValueError(f"{flag} {value} needs --rope_scaling_type, which scales the positions")
    for name, flag, what in (
        ("s2_sink_tokens", "--sink_tokens", "whose groups see those tokens"),
        ("s2_group_size", "--s2_group_size", "which makes the groups"),
    ):
        value = getattr(options, flag[2:])
        if value is not None:
            if not any(_has_groups(arm, shared) for arm in arms):
                raise ValueError(f"{flag} {value} needs --s2_attn, {what}, or a method that has it, such as longlora")
            shared[name] = value
    if options.target_modules:
        shared["lora_target_modules"] = tuple(options.target_modules)
    return shared


def _has_groups(arm: Arm, shared: dict[str, Any]) -> bool:
    config = arm.config(shared)
    return config is not None and config.s2_attn_enabled
