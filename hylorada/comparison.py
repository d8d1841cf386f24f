"""Methods on equal terms: the same weights, layers and batches, each run in a process of its own."""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import statistics
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .baselines import baseline_config, get_baseline_model
from .config import PRESETS, HyLoRADAConfig
from .data import collate, make_dataloader, pad_token_id
from .evaluation import batch_loss_sum, predicted_tokens
from .peak_memory import PeakMemory, peak_memory
from .pretrained import DTYPES, load_pretrained
from .s2_attention import SMALLEST_AUTO_GROUP
from .trainer import HyLoRADATrainer, StepRecord, TrainingConfig


@dataclass(frozen=True)
class Arm:
    """One contender of a comparison.

    name: in tables.   method: of `baselines.METHODS`.   meaning: in words, for the report.
    fields: of HyLoRADAConfig, that make the arm; they win over what all arms share
    """

    name: str
    method: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    meaning: str = ""

    @property
    def is_trained(self) -> bool:
        return self.method != "baseline"

    def overrides(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arm's fields of HyLoRADAConfig: of the shared ones those that its method leaves open, and its own.

        Options of shifted attention go to arms that have it.
        """
        decided = PRESETS.get(self.method, {})
        fields = {name: value for name, value in shared.items() if name not in decided} | dict(self.fields)
        if not (decided | fields).get("s2_attn_enabled", False):
            fields = {name: value for name, value in fields.items() if not name.startswith("s2_")}
        return fields

    def config(self, shared: Mapping[str, Any]) -> HyLoRADAConfig | None:
        """Return the arm's configuration; None where its method is no configuration of HyLoRADAModel."""
        return baseline_config(self.method, **self.overrides(shared))

    def decided(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the arm's method decides otherwise than shared fields that are not at their defaults."""
        preset = PRESETS.get(self.method, {})
        return {
            name: preset[name]
            for name, value in shared.items()
            if name in preset and value not in (preset[name], getattr(HyLoRADAConfig, name))
        }


@dataclass(frozen=True)
class Comparison:
    """What all arms of a comparison share.

    model, dtype: what is adapted, and "fp32" or "bf16", the dtype of its weights
    original_length: how many positions the model is declared to be trained for, where RoPE scaling begins
    shared: fields of HyLoRADAConfig
    training: how to train; learning rate and seed are given to each run
    train_rows, test_rows: rows with input_ids and optionally labels
    by_row: perplexity is the mean of each row's own, else it is weighted by tokens
    """

    model: str
    dtype: str
    shared: Mapping[str, Any]
    training: TrainingConfig
    train_rows: Sequence[Mapping[str, Any]]
    test_rows: Sequence[Mapping[str, Any]]
    original_length: int | None = None
    by_row: bool = False

    @property
    def test_tokens(self) -> list[int]:
        """How many tokens of each held-out row are predicted."""
        return [int(predicted_tokens(collate([row]))) for row in self.test_rows]

    def perplexity(self, losses: Sequence[float]) -> float:
        """Return the perplexity out of the mean loss of each held-out row."""
        if self.by_row:
            return statistics.fmean(map(_exp, losses))
        tokens = self.test_tokens
        return _exp(sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens))


def check_groups(arm: Arm, shared: Mapping[str, Any], max_length: int) -> None:
    """Raise ValueError where an arm's shifted attention would see whole rows: it would change nothing."""
    config = arm.config(shared)
    if config is None or not config.s2_attn_enabled:
        return
    size = config.s2_group_size
    # the first border of a shifted layer
    shift = round(config.s2_shift_ratio * (SMALLEST_AUTO_GROUP if isinstance(size, str) else size))
    if max_length <= shift:
        raise ValueError(
            f"the shifted attention of {arm.name} changes nothing at --max_length {max_length}: with --s2_group_size "
            f"{size} the first border of a group is after {shift} tokens; give a longer --max_length or a smaller "
            "--s2_group_size"
        )


def load_base(comparison: Comparison) -> tuple[PreTrainedModel, Any]:
    """Return the model that every arm starts from, and its tokenizer."""
    model, tokenizer = load_pretrained(comparison.model, DTYPES[comparison.dtype])
    declare_length(model, comparison.original_length)
    return model, tokenizer


def declare_length(model: PreTrainedModel, length: int | None) -> None:
    """Declare how many positions a model was trained for, which is where its RoPE scaling begins; None: leave it."""
    if length is not None:
        model.config.max_position_embeddings = length


def run_in_own_process(
    comparison: Comparison, arm: Arm, learning_rate: float | None, seed: int, before: list[float] | None
) -> dict[str, Any]:
    """`run_arm` in a fresh process: its peak memory is the arm's, and no arm inherits another one's state.

    RuntimeError where that process is killed; it ends itself where this one is.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context, initializer=_end_with_parent) as executor:
        try:
            return executor.submit(run_arm, comparison, arm, learning_rate, seed, before).result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"the process of {arm.name}, seed {seed}, was killed, most often for want of memory: try a smaller "
                "--batch_size or --max_length, or --gradient_checkpointing; earlier rows are in the report"
            ) from error


def _end_with_parent() -> None:
    """A process that was left alone would train on for hours, for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_arm(
    comparison: Comparison, arm: Arm, learning_rate: float | None, seed: int, before: list[float] | None
) -> dict[str, Any]:
    """Evaluate an arm, train it, evaluate it again; return what was measured.

    learning_rate: None for an arm that is not trained
    before: the mean loss of each held-out row before training, where it is known: no seed changes it
    """
    torch.manual_seed(seed)
    base, tokenizer = load_base(comparison)
    base.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    model = get_baseline_model(arm.method, base, **arm.overrides(comparison.shared))
    peak = PeakMemory()
    if before is None:
        with peak_memory() as peak:
            before = row_losses(model, comparison.test_rows)
    measured: dict[str, Any] = {
        "trainable_parameters": 0,
        "learning_rate": None,
        "seconds_per_step": None,
        "steps": {},
        "losses_before": before,
        "losses_after": before,
        "weights": [1] * len(before) if comparison.by_row else comparison.test_tokens,
    }
    if arm.is_trained:
        assert learning_rate is not None
        training = dataclasses.replace(comparison.training, learning_rate=learning_rate, seed=seed)
        batch_size = training.per_device_batch_size or 1
        loader = make_dataloader(comparison.train_rows, batch_size, pad_token_id(tokenizer), shuffle=True)  # type: ignore[arg-type]
        with peak_memory() as peak:
            steps = HyLoRADATrainer(model=model, train_dataloader=loader, config=training).train().steps
        measured |= {
            "trainable_parameters": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
            "learning_rate": learning_rate,
            "seconds_per_step": statistics.median(record.seconds for record in steps),
            "steps": _columns(steps),
            "losses_after": row_losses(model, comparison.test_rows),
        }
    config = getattr(model, "hylorada_config", None)
    return measured | {
        "config": None if config is None else config.to_dict(),
        "perplexity_before": comparison.perplexity(measured["losses_before"]),
        "perplexity_after": comparison.perplexity(measured["losses_after"]),
        "peak_memory_mib": peak.mib,
        "peak_memory_source": peak.source,
    }


def row_losses(model: nn.Module, rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the mean loss over the predicted tokens of each row, with the model in evaluation mode."""
    device = next(model.parameters()).device
    model.eval()
    losses = []
    with torch.no_grad():
        for row in tqdm(rows, "evaluating", leave=False):
            batch = {name: values.to(device) for name, values in collate([row]).items()}
            loss_sum, tokens = batch_loss_sum(model, batch)
            losses.append(round(float(loss_sum) / int(tokens), 6))
    return losses


def _columns(steps: Sequence[StepRecord]) -> dict[str, list[float]]:
    """The record of training, one list for each number: short in a file."""
    names = ("loss", "learning_rate", "grad_norm", "tokens", "seconds")
    return {name: [float(f"{getattr(step, name):.7g}") for step in steps] for name in names}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf
