"""Shifted sparse attention inside any transformers model, through its attention and mask interfaces."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from hylorada_kernels.ops.shifted_attention import shifted_attention

from .daa import DirectAttention
from .position import find_backbone
from .row_attention import row_attention

NAME = "hylorada_s2"
SMALLEST_AUTO_GROUP = 2048
# arguments of other attention functions that this one does not compute
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask", "cache")
_CACHE_ATTRIBUTE = "hylorada_group_size"


@dataclass(frozen=True)
class Groups:
    """The groups of a model's shifted sparse attention.

    size: tokens, or "auto": max(2048, L / 4) of the longest text in the batch, kept for as long as its cache is used.
    shift_ratio: o = round(shift_ratio * size) in what is shifted.   sink_tokens: seen by every group.
    shift_mode: "layers" shifts layers 1, 3, ...; "heads" the second half of the query heads in every layer.
    in_evaluation: not only while training.
    """

    size: int | str
    shift_ratio: float
    sink_tokens: int
    shift_mode: str
    in_evaluation: bool

    def chosen_size(self, longest: int) -> int:
        """G for texts of which the longest has `longest` tokens."""
        return self.size if isinstance(self.size, int) else max(SMALLEST_AUTO_GROUP, longest // 4)

    def rule(self, layer: int, size: int) -> dict[str, Any]:
        """The options of `shifted_attention` for one layer."""
        shift = round(self.shift_ratio * size) % size
        heads = "half" if self.shift_mode == "heads" else "all" if layer % 2 else "none"
        if shift == 0 or heads == "none":
            shift, heads = 0, "none"
        return {"group_size": size, "shift": shift, "shifted_heads": heads, "sink_tokens": self.sink_tokens}


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that call an attention function of transformers, in the order of the layers."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx")
        and hasattr(module, "config")
        and "attention_mask" in inspect.signature(module.forward).parameters
        and getattr(module, "is_causal", False)
    ]


def has_attention_switch(module: nn.Module) -> bool:
    """Whether an AttentionSwitch already chooses the attention of a layer."""
    return hasattr(module, "hylorada_layer")


class AttentionSwitch:
    """Chooses for every forward pass of a model between its own attention and the one of this module.

    A hook on the backbone decides, by the mode and the kind of call, and gives the backbone a copy of its config that
    names "hylorada_s2"; so transformers asks `_make_layout` for the mask. That mask, a Layout, reaches every attention
    layer as an argument; a hook there gives the layer the config that fits. A recomputation in the backward has the
    arguments of its own forward and so the attention of its own forward. In every other forward the model has its own
    config, and nothing of this module takes part.

    Args:
        model: a causal language model whose `attention_layers` use transformers' attention interface.
        groups: of shifted sparse attention, or None.
        direct: Direct Attention Adaptation, which acts in every mode, or None.
    """

    def __init__(self, model: nn.Module, groups: Groups | None, direct: DirectAttention | None):
        layers = attention_layers(model)
        backbone = find_backbone(model, set(layers))
        self.groups, self.direct = groups, direct
        self.config: Any = backbone.config
        self._argument_names = list(inspect.signature(backbone.forward).parameters)
        self._is_generating = False
        _register()
        backbone.register_forward_pre_hook(self._enter, with_kwargs=True)
        backbone.register_forward_hook(self._leave, always_call=True)
        for index, layer in enumerate(layers):
            attention: Any = layer
            attention.hylorada_layer = _Layer(self, index, attention.layer_idx, attention.config)
            layer.register_forward_pre_hook(_choose, with_kwargs=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        # a pickled model may come into a process that has made none
        _register()

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Inside, the model's own attention is used, also in train mode, unless evaluation has groups too."""
        outer, self._is_generating = self._is_generating, True
        try:
            yield
        finally:
            self._is_generating = outer

    def _enter(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        in_training = backbone.training and not self._is_generating
        grouped = self.groups is not None and (in_training or self.groups.in_evaluation)
        attention_backbone: Any = backbone
        if not grouped and self.direct is None:
            attention_backbone.config = self.config
            return
        given = dict(zip(self._argument_names, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            what = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
            raise ValueError(
                f"{_title(grouped)} makes its own pattern and takes an attention_mask of shape (batch, length) that "
                f"marks padding, got one of {what}; pass that, separate documents by position_ids that restart, and "
                'use no static cache (cache_implementation="dynamic")'
            )
        if given.get("output_attentions"):
            raise ValueError(f"{_title(grouped)} has no attention weights; leave output_attentions out")
        config = copy.copy(self.config)
        config._attn_implementation_internal = NAME
        attention_backbone.config = config
        call = _Call(backbone, grouped, given.get("position_ids"), given.get("cu_seq_lens_q"))
        _running.set((*_running.get(), call))

    def _leave(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        *outer, call = _running.get() or (None,)
        if call is None or call.backbone is not backbone:
            return
        _running.set(tuple(outer))
        # an interrupted forward has no output
        if output is not None and not call.has_layout:
            raise RuntimeError(
                f"{type(backbone).__name__} does not make its mask by transformers' interface, so "
                f"{_title(call.grouped)} could not act; set s2_attn_enabled=False and daa_enabled=False"
            )


@dataclass
class _Call:
    """What a running forward pass of a backbone was given."""

    backbone: nn.Module
    grouped: bool
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    has_layout: bool = False


# of this thread, the innermost last
_running: ContextVar[tuple[_Call, ...]] = ContextVar("running", default=())


class _Layer:
    """What the attention function has to know of one attention layer."""

    def __init__(self, switch: AttentionSwitch, index: int, layer_idx: int, config: Any):
        self.switch, self.index, self.layer_idx, self.config = switch, index, layer_idx, config


class Layout:
    """Where the texts of a batch are: what stands in the place of an attention mask during one forward pass.

    first, stop: (B,) columns of the keys where every row's text begins and ends, or None where rows are full.
    cu_seqlens: (documents + 1,) for packed documents, or None.   selected: (tokens,) their columns in the flattened
        batch, or None where these are all of one row.
    longest: tokens of the longest text.   latest_first: the greatest of `first`.
    group_size: of this pass; None until the first layer has chosen one, and without groups.
    """

    first: Tensor | None = None
    stop: Tensor | None = None
    latest_first = 0
    cu_seqlens: Tensor | None = None
    selected: Tensor | None = None
    group_size: int | None = None

    def __init__(self, config: Any, grouped: bool, length: int, keys: int, window: int | None):
        self.config, self.grouped, self.length, self.keys, self.window = config, grouped, length, keys, window
        self.longest = keys

    @property
    def is_cached(self) -> bool:
        return self.keys != self.length

    def set_padding(self, mask: Tensor | None, dropped: int) -> None:
        """mask: (B, keys + dropped) bool; dropped: columns that the cache of a sliding window no longer has."""
        if mask is None and not dropped:
            return
        if mask is None:
            self.first, self.stop = torch.tensor([-dropped]), torch.tensor([self.keys])
            return
        begins = mask.clone()
        begins[:, 1:] &= ~mask[:, :-1]
        first, counts = mask.long().argmax(1), mask.sum(1)
        if (begins.sum(1) > 1).any():
            raise ValueError(
                f"attention_mask has holes in row {int((begins.sum(1) > 1).nonzero()[0])}: {_title(self.grouped)} "
                "takes padding on the left or on the right of a text only; remove the masked tokens, or pack the texts "
                "with position_ids that restart"
            )
        if not dropped and bool((counts == mask.shape[1]).all()):
            return
        self.first, self.stop = first - dropped, first - dropped + counts
        self.latest_first, self.longest = max(0, int(self.first.max())), int(counts.max())

    def set_documents(self, mask: Tensor | None, batch: int, call: _Call) -> None:
        """Find packed documents: by cu_seq_lens_q, or where position_ids restart in a text."""
        if call.cu_seqlens is not None:
            self._set_boundaries(mask, batch, call.cu_seqlens)
            return
        if call.position_ids is None or self.length < 2:
            return
        positions = call.position_ids
        if positions.dim() != 2 or positions.shape[1] != self.length:
            raise ValueError(
                f"{_title(self.grouped)} needs position_ids of shape ({batch}, {self.length}) or (1, {self.length}), "
                f"got {tuple(positions.shape)}"
            )
        restarts = (positions.diff(dim=1) != 1).expand(batch, -1)
        inside = mask[:, -self.length :] if mask is not None else restarts.new_ones(batch, self.length)
        inside = inside.to(restarts.device)
        begins = inside.clone()
        begins[:, 1:] &= restarts | ~inside[:, :-1]
        if not bool((begins[:, 1:] & inside[:, :-1]).any()):
            return
        if self.is_cached:
            raise ValueError(
                f"{_title(self.grouped)} cannot continue packed documents from a cache: position_ids restart in this "
                "call; generate from each document alone"
            )
        selected = inside.flatten().nonzero().squeeze(1)
        starts = begins.flatten()[selected].nonzero().squeeze(1)
        self.cu_seqlens = torch.cat([starts, starts.new_tensor([len(selected)])])
        self.selected = None if batch == 1 and len(selected) == self.length else selected
        self.first = self.stop = None
        self.longest = int(self.cu_seqlens.diff().max())

    def _set_boundaries(self, mask: Tensor | None, batch: int, boundaries: Tensor) -> None:
        given = boundaries.tolist()
        if batch != 1 or self.first is not None or self.is_cached:
            raise ValueError("cu_seq_lens_q needs one packed row, without padding and without a filled cache")
        if given[0] != 0 or given[-1] != self.length or given != sorted(given):
            raise ValueError(f"cu_seq_lens_q must rise from 0 to {self.length}, the length of the row, got {given}")
        self.cu_seqlens, self.longest = boundaries, int(boundaries.diff().max())

    def choose_group_size(self, groups: Groups, cache: Cache | None) -> None:
        """Once for a forward pass; "auto" is kept on the cache that the pass fills."""
        if not self.grouped or self.group_size is not None:
            return
        if self.is_cached and groups.size == "auto":
            self.group_size = getattr(cache, _CACHE_ATTRIBUTE, None)
            if self.group_size is None:
                raise ValueError(
                    's2_group_size="auto" is fixed when a cache is filled, and this cache was filled without shifted '
                    "sparse attention; give s2_group_size a number, or fill the cache with this model"
                )
            return
        self.group_size = groups.chosen_size(self.longest)
        if cache is not None:
            setattr(cache, _CACHE_ATTRIBUTE, self.group_size)


def _register() -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _make_layout)


def _title(grouped: bool) -> str:
    return "shifted sparse attention" if grouped else "Direct Attention Adaptation"


def _choose(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """A pre-hook of an attention layer: the config of the pass that its arguments belong to."""
    attention: Any = layer
    own: _Layer = attention.hylorada_layer
    layout = next((value for value in (*args, *kwargs.values()) if isinstance(value, Layout)), None)
    attention.config = own.config if layout is None else layout.config
    if layout is not None and own.switch.groups is not None:
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        layout.choose_group_size(own.switch.groups, cache)


def _make_layout(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    **_: Any,
) -> Layout:
    """The mask function: see transformers' `create_causal_mask` for its arguments."""
    if not _running.get():
        raise RuntimeError(
            f'"{NAME}" is not for set_attn_implementation: it belongs to models that '
            "HyLoRADAModel(base_model, HyLoRADAConfig(s2_attn_enabled=True)) made"
        )
    call = _running.get()[-1]
    title = _title(call.grouped)
    if use_vmap:
        raise ValueError(f"{title} cannot follow this model's own mask function; switch it off for this model")
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_length + kv_offset:
        raise ValueError(
            f"{title} needs a cache that grows with the text, got one of {kv_length} places for "
            f'{int(q_offset) + q_length} tokens; use cache_implementation="dynamic"'
        )
    if attention_mask is not None and attention_mask.shape[-1] != kv_length + kv_offset:
        raise ValueError(
            f"{title} needs an attention_mask for the {kv_length + kv_offset} tokens in the cache and in this call, "
            f"got {attention_mask.shape[-1]}"
        )
    layout = Layout(config, call.grouped, q_length, kv_length, local_size)
    layout.set_padding(attention_mask, kv_offset)
    layout.set_documents(attention_mask, batch_size, call)
    call.has_layout = True
    return layout


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Layout,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: query (B, Hq, Lq, D), key and value (B, Hkv, Lk, D) -> (B, Lq, Hq, D)."""
    attention: Any = module
    layer: _Layer = attention.hylorada_layer
    layout = attention_mask
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{_title(layout.grouped)} does not compute {name!r}, which {type(module).__name__} needs")
    direct, groups = layer.switch.direct, layer.switch.groups
    rule = _FULL if layout.group_size is None or groups is None else groups.rule(layer.layer_idx, layout.group_size)
    options = {"scale": query.shape[-1] ** -0.5 if scaling is None else scaling, "dropout_p": dropout}
    bias = None
    if direct is not None:
        query = direct.scaled_query(layer.index, query)
        bias = direct.bias_by_distance(layer.index, layout.keys, query.device)
    if bias is None and not layout.is_cached and _spans(rule, layout) <= (layout.window or layout.longest):
        out = _fused(query, key, value, layout, rule, options)
    else:
        out = _by_rows(query, key, value, layout, rule, options | {"distance_bias": bias})
    return out.transpose(1, 2), None


# the rule of attention without groups
_FULL: dict[str, Any] = {"group_size": None, "shift": 0, "shifted_heads": "none", "sink_tokens": 0}


def _spans(rule: dict[str, Any], layout: Layout) -> int:
    """How many tokens back a rule reaches, itself included."""
    if rule["group_size"] is None or rule["sink_tokens"]:
        return layout.longest
    return min(rule["group_size"], layout.longest)


def _fused(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: dict[str, Any], options: dict[str, Any]) -> Tensor:
    rule = rule | {"group_size": rule["group_size"] or max(1, layout.length)} | options
    if layout.cu_seqlens is not None:
        packed = [_flattened(tensor, layout.selected) for tensor in (q, k, v)]
        out = shifted_attention(*packed, cu_seqlens=layout.cu_seqlens.to(q.device), **rule)
        return _unflattened(out, layout.selected, q)
    if layout.first is None or layout.stop is None:
        return shifted_attention(q, k, v, **rule)
    first, stop = layout.first.to(q.device), layout.stop.to(q.device)
    if layout.latest_first == 0:
        return shifted_attention(q, k, v, lengths=stop, **rule)
    # every text moves to the start of its row, and its padding, whichever side it was on, to the end
    columns = torch.arange(layout.length, device=q.device)
    there, back = (columns + first[:, None]) % layout.length, (columns - first[:, None]) % layout.length
    out = shifted_attention(*(_rolled(tensor, there) for tensor in (q, k, v)), lengths=stop - first, **rule)
    return _rolled(out, back)


def _by_rows(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rule: dict[str, Any], options: dict[str, Any]) -> Tensor:
    heads = q.shape[1]
    shifted = {"none": heads, "half": heads // 2, "all": 0}[rule["shifted_heads"]]
    offsets = rule["shift"] * (torch.arange(heads, device=q.device) >= shifted).long() if rule["shift"] else None
    options = options | {
        "group_size": rule["group_size"],
        "offsets": offsets,
        "sink_tokens": rule["sink_tokens"],
        "window": layout.window,
    }
    if layout.cu_seqlens is not None:
        sizes = layout.cu_seqlens.diff().tolist()
        packed = [_flattened(tensor, layout.selected).split(sizes, dim=2) for tensor in (q, k, v)]
        out = torch.cat([row_attention(*document, **options) for document in zip(*packed, strict=True)], dim=2)
        return _unflattened(out, layout.selected, q)
    if layout.first is not None and layout.stop is not None:
        options |= {
            "first": layout.first.to(q.device).expand(len(q)),
            "stop": layout.stop.to(q.device).expand(len(q)),
            "latest_first": layout.latest_first,
        }
    return row_attention(q, k, v, **options)


def _flattened(tensor: Tensor, selected: Tensor | None) -> Tensor:
    """(B, H, L, D) -> (1, H, tokens, D), the selected tokens of all rows in one."""
    if selected is None:
        return tensor
    rows = tensor.transpose(1, 2).flatten(0, 1).index_select(0, selected.to(tensor.device))
    return rows.transpose(0, 1).unsqueeze(0)


def _unflattened(packed: Tensor, selected: Tensor | None, like: Tensor) -> Tensor:
    """The inverse of _flattened, with 0 for what was not selected."""
    if selected is None:
        return packed
    batch, heads, length, _ = like.shape
    rows = packed.new_zeros(batch * length, heads, packed.shape[-1])
    rows = rows.index_copy(0, selected.to(packed.device), packed.squeeze(0).transpose(0, 1))
    return rows.unflatten(0, (batch, length)).transpose(1, 2)


def _rolled(tensor: Tensor, columns: Tensor) -> Tensor:
    """tensor[b, :, columns[b, i]] for (B, H, L, D)."""
    return tensor.take_along_dim(columns[:, None, :, None], dim=2)
