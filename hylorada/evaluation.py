"""Evaluation of language models: one call for each question, one for several models, one for everything."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .config import HyLoRADAConfig
from .perplexity import (
    batch_loss_sum,
    check_packing,
    evaluate_perplexity,
    evaluation_windows,
    mean_loss,
    predicted_tokens,
    window_losses,
)
from .retrieval import (
    KeyValueTask,
    evaluate_lost_in_the_middle,
    evaluate_passkey,
    evidence_by_depth,
    key_value_retrieval,
    position_perplexity,
)
from .statistics import paired_difference

__all__ = [
    "KeyValueTask",
    "batch_loss_sum",
    "check_packing",
    "compare_models",
    "evaluate_lost_in_the_middle",
    "evaluate_passkey",
    "evaluate_perplexity",
    "evidence_by_depth",
    "key_value_retrieval",
    "mean_loss",
    "position_perplexity",
    "predicted_tokens",
    "run_full_evaluation",
]

# what evaluate_perplexity reads at once by default
_LONGEST = 4096


def compare_models(
    models: Mapping[str, nn.Module],
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any = None,
    max_length: int = 4096,
    *,
    stride: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return the perplexity of every model on the same windows, and how its loss differs from the first one's.

    models: by name; the first is the one that the others are compared with
    dataset, tokenizer, max_length, stride, batch_size: as `evaluate_perplexity` takes them

    Returns windows, tokens (predicted ones), and of every model perplexity, loss, and for all but the first
    loss_difference: its loss minus the first one's, and the 95 % interval of the paired bootstrap over windows. Windows
    of one document resemble one another: the interval speaks of such windows, not of documents.
    """
    if len(models) < 2:
        raise ValueError(f"a comparison needs at least 2 models, got {list(models)}")
    dataset = list(dataset)
    sums: dict[str, list[float]] = {}
    for name, model in models.items():
        windows = evaluation_windows(model, dataset, tokenizer, max_length, stride)
        sums[name], counts = window_losses(model, windows, tokenizer, batch_size, show_progress)
    kept = [i for i, count in enumerate(counts) if count]
    weights = [counts[i] for i in kept]
    means = {name: [total[i] / counts[i] for i in kept] for name, total in sums.items()}

    first = next(iter(models))
    results: dict[str, Any] = {}
    for name in models:
        loss = sum(sums[name]) / sum(counts)
        results[name] = {"perplexity": math.exp(loss) if loss < 709 else math.inf, "loss": loss}
        if name != first:
            mean, low, high = paired_difference(means[name], means[first], weights=weights, seed=seed)
            results[name]["loss_difference"] = {"mean": mean, "interval": [low, high]}
    return {"windows": len(kept), "tokens": sum(counts), "compared_with": first, "models": results}


def run_full_evaluation(
    model: nn.Module,
    test_dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any,
    config: HyLoRADAConfig | None = None,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    num_samples: int = 20,
    task: KeyValueTask | None = None,
    batch_size: int = 1,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Return everything that can be measured of a model here: perplexity, lost in the middle, passkeys, parameters.

    config: the model's; default: its own hylorada_config, if it has one
    max_length: default: 4096, or less where the model has fewer positions or config a smaller max_sequence_length
    stride: of the perplexity; num_samples: of every retrieval; task: of the key-value retrieval

    Returns config, max_length, parameters (total, trainable), perplexity, loss, lost_in_the_middle as
    `evaluate_lost_in_the_middle` gives it, and passkey as `evaluate_passkey` does (None for a model without generate).
    """
    config = config or getattr(model, "hylorada_config", None)
    if max_length is None:
        positions = getattr(model.config, "max_position_embeddings", None)
        limits = (_LONGEST, positions, None if config is None else config.max_sequence_length)
        max_length = min(limit for limit in limits if limit is not None)
    test_dataset = list(test_dataset)
    shared: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "show_progress": show_progress}
    perplexity, loss = evaluate_perplexity(model, test_dataset, tokenizer, stride=stride, **shared)
    shared["seed"] = seed
    parameters = list(model.parameters())
    can_generate = callable(getattr(model, "generate", None))
    return {
        "config": config.to_dict() if config is not None else None,
        "max_length": max_length,
        "parameters": {
            "total": sum(parameter.numel() for parameter in parameters),
            "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        },
        "perplexity": perplexity,
        "loss": loss,
        "lost_in_the_middle": evaluate_lost_in_the_middle(
            model, test_dataset, tokenizer, num_samples, task=task, **shared
        ),
        "passkey": evaluate_passkey(model, tokenizer, num_samples, **shared) if can_generate else None,
    }
