"""Losses of a causal language model by token, window and text; held-out perplexity, weighted by tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    stride: int | None = None,
    batch_size: int = 1,
    show_progress: bool = False,
) -> tuple[float, float]:
    """Return (perplexity, loss), perplexity = exp(loss), loss = mean of -log p over all predicted tokens.

    Without stride every text is cut into consecutive windows of max_length tokens, none is dropped or shortened; each
    token of a window but its first is predicted from the window's earlier ones. With stride the windows overlap: each
    begins stride tokens after the one before and predicts what that one did not, so that every token of a text but its
    first is predicted once, from all tokens before it or from at least max_length - stride of them. Padding is neither
    read nor predicted.

    model: an adapted model or any causal language model of transformers; left in the mode that it was in
    dataset: texts, or rows with `text`, or with `input_ids` and optionally `attention_mask` (0 on padding) and
        `labels` (-100 where a token is not to be predicted)
    tokenizer: needed for texts
    stride: from 1 to max_length - 1; None: windows that do not overlap
    batch_size: windows in one forward pass
    """
    rows = evaluation_windows(model, dataset, tokenizer, max_length, stride)
    loss = mean_loss(model, window_batches(rows, tokenizer, batch_size, show_progress))
    return math.exp(loss) if loss < 709 else math.inf, loss


def evaluation_windows(
    model: nn.Module,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any,
    max_length: int,
    stride: int | None = None,
) -> list[dict[str, list[int]]]:
    """Return the windows that `evaluate_perplexity` predicts: their input_ids, and labels where they are predicted."""
    if stride is not None and not 1 <= stride < max_length:
        raise ValueError(f"stride must lie between 1 and max_length - 1 = {max_length - 1}, got {stride}")
    rows = [window for row in dataset for window in _row_windows(row, tokenizer, max_length, stride)]
    if not rows:
        raise ValueError("dataset holds no token to predict: it is empty, or every row is shorter than 2 tokens")
    check_learned_positions(model, max(len(row["input_ids"]) for row in rows))
    return rows


def window_batches(
    rows: Sequence[Mapping[str, list[int]]], tokenizer: Any, batch_size: int, show_progress: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield the windows in batches, in their order, padded on the right."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    padding = pad_token_id(tokenizer) if tokenizer is not None else 0
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, "evaluating", disable=not show_progress, leave=False):
        yield collate(rows[start : start + batch_size], padding)


def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the mean loss over all predicted tokens of the batches; nan where there is none."""
    device = next(model.parameters()).device
    loss_sum, tokens = 0.0, 0
    with evaluation_mode(model), torch.no_grad():
        for batch in batches:
            batch_loss, batch_tokens = batch_loss_sum(model, {name: value.to(device) for name, value in batch.items()})
            loss_sum += float(batch_loss)
            tokens += int(batch_tokens)
    return loss_sum / tokens if tokens else math.nan


def window_losses(
    model: nn.Module, rows: Sequence[Mapping[str, list[int]]], tokenizer: Any, batch_size: int, show_progress: bool
) -> tuple[list[float], list[int]]:
    """Return the summed loss of every window, and how many of its tokens are predicted."""
    sums: list[float] = []
    counts: list[int] = []
    for losses, predicted in batch_losses(model, rows, tokenizer, batch_size, show_progress):
        sums += losses.double().sum(1).tolist()
        counts += predicted.sum(1).tolist()
    return sums, counts


def batch_losses(
    model: nn.Module, rows: Sequence[Mapping[str, list[int]]], tokenizer: Any, batch_size: int, show_progress: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield of every batch of windows -log p, (B, L-1), and which of these tokens are predicted, on the CPU."""
    device = next(model.parameters()).device
    with evaluation_mode(model), torch.no_grad():
        for batch in window_batches(rows, tokenizer, batch_size, show_progress):
            losses = token_losses(model, {name: value.to(device) for name, value in batch.items()})
            yield losses.cpu(), _targets(batch) != IGNORED_LABEL


def batch_loss_sum(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed loss (fp32) and the number of predicted tokens of one batch.

    batch: input_ids (B, L), optionally attention_mask (0 on padding), labels (-100: not predicted; default the
        input_ids without padding), and whatever else the model takes
    """
    losses = token_losses(model, batch)
    return losses.sum(), predicted_tokens(batch)


def token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return -log p of every token but the first, (B, L-1), fp32; 0 where it is not predicted.

    batch: as `batch_loss_sum` takes it
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    targets = _targets(batch)
    # labels stay out of the call: the model would return the mean of a batch, which forgets how many tokens it had
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view(targets.shape)


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


def token_row(row: str | Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the input_ids and the labels of a text or a row as `evaluate_perplexity` takes it, without padding."""
    if isinstance(row, str):
        row = {"text": row}
    if "position_ids" in row:
        raise ValueError("a row with position_ids is packed of several documents: pass every document as its own row")
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
    return [input_ids[i] for i in kept], [labels[i] for i in kept]


def _row_windows(
    row: str | Mapping[str, Any], tokenizer: Any, max_length: int, stride: int | None
) -> Iterator[dict[str, list[int]]]:
    input_ids, labels = token_row(row, tokenizer)
    for window, first_new in _windows(list(range(len(input_ids))), max_length, stride):
        known = [IGNORED_LABEL] * first_new
        yield {"input_ids": [input_ids[i] for i in window], "labels": known + [labels[i] for i in window[first_new:]]}


def _windows(tokens: list[int], max_length: int, stride: int | None) -> Iterator[tuple[list[int], int]]:
    """Yield every window and the place in it of the first token that it predicts (0: all but the first)."""
    if stride is None:
        yield from ((window, 0) for window in windows(tokens, max_length))
        return
    predicted = min(len(tokens), 1)
    for start in range(0, len(tokens), stride):
        window = tokens[start : start + max_length]
        if start + len(window) > predicted:
            yield window, predicted - start
            predicted = start + len(window)


def _integers(values: Any) -> list[int]:
    tensor = torch.as_tensor(values)
    if tensor.dim() != 1:
        raise ValueError(f"a row is one sequence: expected one dimension, got shape {tuple(tensor.shape)}")
    return tensor.tolist()


def check_packing(model: nn.Module) -> None:
    """Raise ValueError for a model in which a packed document sees the one before it in its row."""
    device = next(model.parameters()).device
    rows = torch.tensor([[3, 4], [5, 4]], device=device)
    with evaluation_mode(model), torch.no_grad():
        first, second = model(input_ids=rows, position_ids=torch.zeros_like(rows), use_cache=False).logits[:, 1].float()
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} does not keep packed documents apart: pad its rows (token_blocks) in place of "
            "pack_blocks"
        )


def check_learned_positions(model: nn.Module, longest: int) -> None:
    """Raise ValueError where a window is longer than the model's table of positions."""
    config = getattr(model, "config", None)
    limit = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None)
    if limit is not None and not rotary and longest > limit:
        raise ValueError(
            f"a window of {longest} tokens, but the model knows {limit} positions: pass max_length={limit}"
        )


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
