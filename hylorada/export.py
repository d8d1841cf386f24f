"""A merged model on the disk, in the format of transformers, with a report of what the merge and the dtype change."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from . import hub
from .data import windows
from .model import RUNTIME_PARTS, HyLoRADAModel

REPORT_FILE = "merge_report.json"
_LOAD = """from transformers import AutoModelForCausalLM

# the folder with this file, or its name on a hub
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")"""


@dataclass(frozen=True)
class Parity:
    """A merged model beside the adapted model that it was made of, both with base weights of one dtype.

    dtype: of the weights.   tokens: that were compared.   logits_max_difference: the largest, in absolute value.
    logits_relative_difference: || merged - adapted || / || adapted || over all logits.
    argmax_agreement: the part of the tokens after which both expect the same token.
    adapted_perplexity, merged_perplexity: of the texts.
    """

    dtype: str
    tokens: int
    logits_max_difference: float
    logits_relative_difference: float
    argmax_agreement: float
    adapted_perplexity: float
    merged_perplexity: float


def export_merged(
    model: HyLoRADAModel,
    directory: str | os.PathLike,
    dataset: Iterable[str | Mapping[str, Any]],
    tokenizer: Any = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_length: int = 512,
    show_progress: bool = False,
) -> list[Parity]:
    """Merge a copy of the model, save it whole in a dtype, and compare it with the model on texts.

    The weights are merged in fp32 and rounded once. The folder holds what `HyLoRADAModel.save_pretrained` writes of a
    merged model (transformers loads it, without the parts that no weight can hold), merge_report.json and a model card.

    Args:
        model: not merged; stays as it is. Two copies of it are in memory on the way.
        directory: is made.
        dataset: texts, or rows with `text` or `input_ids`, whose windows of max_length tokens are compared.
        tokenizer: needed for texts; is saved beside the model where it is given.
        dtype: of the saved weights.

    Returns:
        What fp32 merging changes, and, where dtype is another one, what merging in it does.

    Raises:
        TypeError: not a HyLoRADAModel, or no floating point dtype.   ValueError: no token to predict in the dataset.
        RuntimeError: merged already, or it cannot be merged.   OSError: the files could not be written.
    """
    if not isinstance(model, HyLoRADAModel):
        raise TypeError(f"model must be a HyLoRADAModel, got {type(model).__name__}")
    if model.merged:
        raise RuntimeError("the model is merged: call unmerge_lora_weights() first, or save it with save_pretrained")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point torch.dtype, got {dtype!r}")
    rows = [window for row in dataset for window in windows(_token_ids(row, tokenizer), max_length)]
    if not rows:
        raise ValueError("dataset holds no token to predict: it is empty, or every row is shorter than 2 tokens")
    merged = _with_dtype(copy.deepcopy(model), torch.float32)
    merged.merge_lora_weights(keep_base=False)
    report = []
    for kind in dict.fromkeys((torch.float32, dtype)):
        adapted, merged = _with_dtype(copy.deepcopy(model), kind), _with_dtype(merged, kind)
        progress = tqdm(rows, f"comparing in {_name(kind)}", disable=not show_progress, leave=False)
        report.append(_compare(adapted, merged, progress, _name(kind)))
    merged.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    text = json.dumps([asdict(parity) for parity in report], indent=1)
    Path(directory, REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    _write_card(directory, model, report)
    return report


def _with_dtype(model: HyLoRADAModel, dtype: torch.dtype) -> HyLoRADAModel:
    """The model in eval mode, the base model's parameters in a dtype, trained ones too; what was added stays."""
    own = set(model.added_parameters().values())
    # not the buffers: transformers keeps the frequencies of rotary embeddings in fp32
    for parameter in model.parameters():
        if parameter not in own and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model.eval()


@torch.no_grad()
def _compare(adapted: HyLoRADAModel, merged: HyLoRADAModel, rows: Iterable[list[int]], dtype: str) -> Parity:
    device = next(adapted.parameters()).device
    tokens = agreeing = predicted = 0
    largest = squared_difference = squared_size = 0.0
    losses = [0.0, 0.0]
    for row in rows:
        ids = torch.tensor([row], device=device)
        logits = [model(input_ids=ids, use_cache=False).logits[0].float() for model in (adapted, merged)]
        difference = (logits[1] - logits[0]).double()
        largest = max(largest, difference.abs().max().item())
        squared_difference += difference.square().sum().item()
        squared_size += logits[0].double().square().sum().item()
        agreeing += int((logits[0].argmax(-1) == logits[1].argmax(-1)).sum())
        tokens, predicted = tokens + len(row), predicted + len(row) - 1
        losses = [total + _loss_sum(of_model, ids[0]) for total, of_model in zip(losses, logits, strict=True)]
    return Parity(
        dtype,
        tokens,
        largest,
        math.sqrt(squared_difference / squared_size) if squared_size else 0.0,
        agreeing / tokens,
        math.exp(losses[0] / predicted),
        math.exp(losses[1] / predicted),
    )


def _loss_sum(logits: Tensor, ids: Tensor) -> float:
    return F.cross_entropy(logits[:-1], ids[1:], reduction="sum").item()


def _token_ids(row: str | Mapping[str, Any], tokenizer: Any) -> list[int]:
    if isinstance(row, Mapping) and "input_ids" in row:
        return torch.as_tensor(row["input_ids"]).tolist()
    if isinstance(row, Mapping) and "text" not in row:
        raise ValueError(f"a row needs 'text' or 'input_ids', got the fields {sorted(row)}")
    if tokenizer is None:
        raise ValueError("the dataset holds texts: pass tokenizer, or rows with 'input_ids'")
    return tokenizer(row["text"] if isinstance(row, Mapping) else row, verbose=False)["input_ids"]


def _write_card(directory: str | os.PathLike, model: HyLoRADAModel, report: list[Parity]) -> None:
    facts = model.card_facts()
    for parity in report:
        facts[f"Merged beside adapted, {parity.dtype}"] = (
            f"largest difference of a logit {parity.logits_max_difference:.2e}, same next token "
            f"{parity.argmax_agreement:.2%}, perplexity {parity.merged_perplexity:.3f} beside "
            f"{parity.adapted_perplexity:.3f} ({parity.tokens} tokens)"
        )
    missing = [part for field, part in RUNTIME_PARTS.items() if getattr(model.hylorada_config, field)]
    notes = (f"transformers computes it without {', '.join(missing)}; HyLoRADAModel.from_pretrained does not.",)
    hub.write_card(
        directory,
        kind="merged HyLoRADA model",
        base_model=getattr(model.config, "_name_or_path", None) or "",
        facts=facts,
        load=_LOAD,
        library="transformers",
        notes=notes if missing else (),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
