"""The learned position table of a model, made longer."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ORIGINAL = "original_max_position_embeddings"


class PositionTable:
    """A longer table of learned positions. Nothing changes before `apply`.

    "tile" repeats the table from its start: the rows that were there stay, bit for bit, and so do the logits of every
    text that fitted before. "interpolate" stretches it, from the first row to the last: all rows but these two are new.
    Rows before position 0 (OPT has two) stay. Buffers that hold a causal pattern by position grow with the table. The
    model's config gets the new max_position_embeddings, and keeps the old one as original_max_position_embeddings: by
    that a model that is extended so already is known, and stays as it is.

    Args:
        model: one with a learned position table (GPT-2, OPT and others).   factor: target length / original length.
        method: "tile" or "interpolate".

    Attributes:
        method: "tile" or "interpolate".   original_length, target_length: in positions.
        embedding: the table's module.
        weight: its Parameter after `apply`; before, its values can be set.

    Raises:
        ValueError: another method, a factor below 1, a model without a table or with one that is extended otherwise, a
            buffer of another pattern.
    """

    weight: nn.Parameter

    def __init__(self, model: PreTrainedModel, factor: float, method: str = "tile"):
        if method not in ("tile", "interpolate"):
            raise ValueError(f"method must be 'tile' or 'interpolate', got {method!r}")
        if not factor >= 1:
            raise ValueError(f"factor must be at least 1 (target length / original length), got {factor}")
        name = type(model).__name__
        embedding = find_position_table(model)
        if embedding is None:
            raise ValueError(f"{name} has no learned position table to extend; use RoPE scaling")
        config: Any = model.config.get_text_config(decoder=True)
        present = config.max_position_embeddings
        self.original_length = getattr(config, _ORIGINAL, present)
        self.target_length = round(self.original_length * factor)
        self.method, self.embedding, self.weight = method, embedding, cast(nn.Parameter, embedding.weight)
        self._changes: list[_Change] = []
        if present == self.target_length:
            return
        if present != self.original_length:
            raise ValueError(
                f"the position table of {name} is extended already, from {self.original_length} to {present} "
                f"positions and not to {self.target_length}; load the original model again"
            )
        offset = embedding.num_embeddings - present
        table = embedding.weight.detach()
        rows = (_tiled if method == "tile" else _interpolated)(table[offset:], self.target_length)
        self.weight = nn.Parameter(torch.cat([table[:offset], rows]), requires_grad=embedding.weight.requires_grad)
        self._changes = [
            _Change(embedding, "weight", self.weight),
            _Change(embedding, "num_embeddings", len(self.weight)),
            _Change(config, "max_position_embeddings", self.target_length),
            _Change(config, _ORIGINAL, present),
            *_longer_patterns(model, present, self.target_length),
        ]

    def apply(self) -> None:
        """Put the longer table into the model, and its length into the model's config."""
        for change in self._changes:
            setattr(change.holder, change.name, change.new)

    def undo(self) -> None:
        """Give back, after `apply`, what was there before."""
        for change in self._changes:
            if change.old is _Change.ABSENT:
                delattr(change.holder, change.name)
            else:
                setattr(change.holder, change.name, change.old)


class _Change:
    """One attribute of a module or a config, and what it becomes."""

    ABSENT = object()

    def __init__(self, holder: Any, name: str, new: Any):
        self.holder, self.name, self.new = holder, name, new
        self.old = getattr(holder, name, self.ABSENT)


def find_position_table(model: PreTrainedModel) -> nn.Embedding | None:
    """The embedding with a row for every position, after `offset` others; None where positions are not learned."""
    config = model.config.get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None)
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and module is not model.get_input_embeddings()
        and module.num_embeddings - getattr(module, "offset", 0) == length
    ]
    return tables[0] if len(tables) == 1 else None


def table_length(model: PreTrainedModel) -> int | None:
    """How many positions the model's table has, None where positions are not learned: longer texts cannot be read."""
    if find_position_table(model) is None:
        return None
    return model.config.get_text_config(decoder=True).max_position_embeddings


def _tiled(rows: Tensor, length: int) -> Tensor:
    return rows[torch.arange(length, device=rows.device) % len(rows)]


def _interpolated(rows: Tensor, length: int) -> Tensor:
    places = torch.arange(length, device=rows.device, dtype=torch.float64) * (len(rows) - 1) / (length - 1)
    lower = places.long().clamp(max=max(len(rows) - 2, 0))
    upper = (lower + 1).clamp(max=len(rows) - 1)
    share = (places - lower).unsqueeze(1)
    return (rows[lower] * (1 - share) + rows[upper] * share).to(rows.dtype)


def _longer_patterns(model: nn.Module, present: int, length: int) -> list[_Change]:
    """The buffers that hold a causal pattern by position, such as the local attention of GPT-Neo."""
    return [
        _Change(module, name, _longer_pattern(name, buffer, length))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.dtype == torch.bool and buffer.shape[-2:] == (present, present)
    ]


def _longer_pattern(name: str, buffer: Tensor, length: int) -> Tensor:
    """The same pattern by distance; what is farther than the longest distance is like that one."""
    present = buffer.shape[-1]
    by_distance = buffer[..., -1, :].flip(-1)
    columns = torch.arange(length, device=buffer.device)
    distances = columns.unsqueeze(1) - columns
    longer = by_distance[..., distances.clamp(0, present - 1)] & (distances >= 0)
    if not torch.equal(longer[..., :present, :present], buffer):
        raise ValueError(f"the buffer {name} {tuple(buffer.shape)} is no causal pattern by distance: cannot extend it")
    return longer
