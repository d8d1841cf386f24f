"""Held-out perplexity, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import IGNORED_LABEL, collate, pad_token_id, windows


def evaluate_perplexity(
    model: nn.Module,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any = None,
    max_length: int = 4096,
    *,
    batch_size: int = 1,
    show_progress: bool = False,
) -> tuple[float, float]:
    """Return (perplexity, loss), perplexity = exp(loss), loss = mean of -log p over all predicted tokens.

    Every text is cut into consecutive windows of max_length tokens, none is dropped or shortened; each token of a
    window but its first is predicted from the window's earlier ones. Padding is neither read nor predicted.

    model: an adapted model or any causal language model of transformers; left in the mode that it was in
    dataset: texts, or rows with `text`, or with `input_ids` and optionally `attention_mask` (0 on padding) and
        `labels` (-100 where a token is not to be predicted)
    tokenizer: needed for texts
    batch_size: windows in one forward pass
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rows = [window for row in dataset for window in _row_windows(row, tokenizer, max_length)]
    if not rows:
        raise ValueError("dataset holds no token to predict: it is empty, or every row is shorter than 2 tokens")
    _check_learned_positions(model, max(len(row["input_ids"]) for row in rows))

    padding = pad_token_id(tokenizer) if tokenizer is not None else 0
    batches = (collate(rows[i : i + batch_size], padding) for i in range(0, len(rows), batch_size))
    total = math.ceil(len(rows) / batch_size)
    loss = mean_loss(model, tqdm(batches, "evaluating", total, disable=not show_progress, leave=False))
    return math.exp(loss) if loss < 709 else math.inf, loss


def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the mean loss over all predicted tokens of the batches; nan where there is none."""
    device = next(model.parameters()).device
    loss_sum, tokens = 0.0, 0
    with _evaluation_mode(model), torch.no_grad():
        for batch in batches:
            batch_loss, batch_tokens = batch_loss_sum(model, {name: value.to(device) for name, value in batch.items()})
            loss_sum += float(batch_loss)
            tokens += int(batch_tokens)
    return loss_sum / tokens if tokens else math.nan


def batch_loss_sum(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed loss (fp32) and the number of predicted tokens of one batch.

    batch: input_ids (B, L), optionally attention_mask (0 on padding), labels (-100: not predicted; default the
        input_ids without padding), and whatever else the model takes
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = _targets(batch)
    # labels stay out of the call: the model would return the mean of a batch, which forgets how many tokens it had
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    loss_sum = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
    )
    return loss_sum, (targets != IGNORED_LABEL).sum()


def predicted_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """Return how many tokens of a batch are predicted: what `batch_loss_sum` counts, without running a model."""
    return (_targets(batch) != IGNORED_LABEL).sum()


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    # (B, L-1): the token that each position but the last predicts
    targets = batch.get("labels", batch["input_ids"])[:, 1:]
    mask = batch.get("attention_mask")
    if mask is None:
        return targets
    # padding predicts nothing either: on the left it stands before the first real token
    return targets.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), IGNORED_LABEL)


def _row_windows(row: str | Mapping[str, Any], tokenizer: Any, max_length: int) -> Iterator[dict[str, list[int]]]:
    if isinstance(row, str):
        row = {"text": row}
    if "input_ids" not in row:
        if "text" not in row:
            raise ValueError(f"a row needs 'text' or 'input_ids', got the fields {sorted(row)}")
        if tokenizer is None:
            raise ValueError("the dataset holds texts: pass tokenizer=, or rows with 'input_ids'")
        row = {"input_ids": tokenizer(row["text"], verbose=False)["input_ids"]}

    input_ids = _integers(row["input_ids"])
    labels = _integers(row.get("labels", input_ids))
    mask = _integers(row.get("attention_mask", [1] * len(input_ids)))
    if not len(input_ids) == len(labels) == len(mask):
        raise ValueError(
            f"a row's fields differ in length: {len(input_ids)} input_ids, {len(labels)} labels, "
            f"{len(mask)} in attention_mask"
        )
    kept = [i for i, real in enumerate(mask) if real]
    for window in windows(kept, max_length):
        yield {"input_ids": [input_ids[i] for i in window], "labels": [labels[i] for i in window]}


def _integers(values: Any) -> list[int]:
    tensor = torch.as_tensor(values)
    if tensor.dim() != 1:
        raise ValueError(f"a row is one sequence: expected one dimension, got shape {tuple(tensor.shape)}")
    return tensor.tolist()


def _check_learned_positions(model: nn.Module, longest: int) -> None:
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None)
    if limit is not None and not rotary and longest > limit:
        raise ValueError(
            f"a window of {longest} tokens, but the model knows {limit} positions: pass max_length={limit}"
        )


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
