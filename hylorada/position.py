"""Position bias: one learned scale per bucket of logical positions, shared by every adapted linear of a model."""

import inspect
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hylorada_kernels.ops.hybrid_linear.eager import scale_rows

# of int64 positions; 64 log2 buckets would reach beyond
MAX_POSITION = 2**62

# a model's argument for its cache: the name since transformers 5.24, and the one before
CACHE_ARGUMENTS = ("cache", "past_key_values")

# where transformers' decoder layers and torch's checkpoint wrapper keep the function that they checkpoint with
CHECKPOINT_ATTRIBUTES = ("_gradient_checkpointing_func", "checkpoint_fn")


class PositionBias(nn.Module):
    """p = 1 + sigmoid(weight) * tanh(table[bucket(position)]), in fp32; 1 everywhere at the start.

    Parameters:
        table: (num_buckets,) fp32; zeros.   weight: (1,) fp32; zeros.
    """

    starts: Tensor

    def __init__(self, num_buckets: int = 64, max_length: int = 32768, bucket: str = "log", device: Any = None):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_buckets, device=device))
        self.weight = nn.Parameter(torch.zeros(1, device=device))
        starts = torch.tensor(bucket_starts(num_buckets, max_length, bucket)[1:], dtype=torch.int64, device=device)
        self.register_buffer("starts", starts, persistent=False)

    def buckets(self, positions: Tensor) -> Tensor:
        """The bucket of every position, any shape, int64."""
        return torch.bucketize(positions.to(self.starts.device).contiguous(), self.starts, right=True)

    def forward(self, buckets: Tensor) -> Tensor:
        """buckets: any shape, int64. -> the same shape, fp32 (fp64 for an fp64 table)."""
        dtype = torch.promote_types(self.table.dtype, torch.float32)
        scales = 1 + torch.sigmoid(self.weight.to(dtype)) * torch.tanh(self.table.to(dtype))
        return scales[buckets]


def bucket_starts(num_buckets: int, max_length: int, bucket: str) -> list[int]:
    """The first position of every bucket, in exact integer arithmetic.

        "log":   pos if pos < E else min(N - 1, E + floor((N - E) log(pos / E) / log(M / E)))
        "log2":  min(N - 1, floor(log2(pos + 1)))

    with N = num_buckets, E = N // 4, M = max_length. When M is small two buckets may start at one position: the earlier
    one is then empty.
    """
    if bucket == "log2":
        starts = [2**k - 1 for k in range(num_buckets)]
    else:
        exact = num_buckets // 4
        steps = num_buckets - exact
        # the bucket E + k starts where (pos / E)^steps >= (M / E)^k
        bounds = [max_length**k * exact ** (steps - k) for k in range(steps)]
        candidates = range(max_length + 1)
        starts = list(range(exact)) + [bisect_left(candidates, bound, key=lambda pos: pos**steps) for bound in bounds]
    return [start for start in starts if start < MAX_POSITION]


def logical_positions(
    batch: int, length: int, *, position_ids: Tensor | None, attention_mask: Tensor | None, past_length: int
) -> Tensor:
    """Where every token stands in its own document, int64, (batch, length) or (1, length).

    By position_ids, else by the running sum of a 2-D padding mask, else counted on from the cache. What padding gets is
    never read.
    """
    if position_ids is not None:
        if position_ids.dim() > 2 or position_ids.shape[-1] != length:
            raise ValueError(
                f"positions of tokens need position_ids of shape ({batch}, {length}) or (1, {length}), "
                f"got {tuple(position_ids.shape)}"
            )
        return position_ids.reshape(-1, length)
    if attention_mask is not None and attention_mask.dim() == 2:
        running = (attention_mask != 0).long().cumsum(-1) - 1
        if attention_mask.shape[1] < past_length + length:
            return running[:, -length:] + past_length
        return running[:, past_length : past_length + length]
    return torch.arange(length).unsqueeze(0) + past_length


def given_cache(given: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model's call, or None."""
    return next((given[name] for name in CACHE_ARGUMENTS if given.get(name) is not None), None)


def find_backbone(model: nn.Module, linears: set[nn.Module]) -> nn.Module:
    """The innermost module that takes token ids and holds all `linears`: they only run inside of its call."""
    backbone = model
    # a module comes before its parts
    for module in model.modules():
        if "input_ids" in inspect.signature(module.forward).parameters and linears <= set(module.modules()):
            backbone = module
    return backbone


class PositionScale:
    """The position scale of the forward pass that is running, for the layers inside it.

    A hook on the backbone reads the logical positions from the call's arguments, and the layers inside ask for their
    scale. Every checkpointed region computes the scale anew, from the buckets that it was entered with: a recomputation
    in the backward, of either kind and after any other forward, has the positions of its own forward. So has every
    thread.
    """

    def __init__(self, bias: PositionBias, backbone: nn.Module):
        self.bias = bias
        self._argument_names = list(inspect.signature(backbone.forward).parameters)
        self._here = _PlaceOfThread()
        backbone.register_forward_pre_hook(self._enter, with_kwargs=True)
        backbone.register_forward_hook(self._leave, always_call=True)

    def for_input(self, x: Tensor) -> Tensor:
        """The scale for a linear's input x, (..., I). -> x.shape[:-1]."""
        region = self._here.place.region
        if region is None:
            raise RuntimeError(
                "a layer with position bias ran outside of its model's forward, so its tokens have no positions; "
                "call the whole model, use its own gradient checkpointing, or set position_bias_enabled=False"
            )
        scale = region.scale(self.bias)
        if scale.shape != x.shape[:-1]:
            if x.dim() != 2 or scale.numel() != x.shape[0]:
                raise ValueError(
                    f"position bias has positions for tokens {tuple(scale.shape)}, but an adapted linear received "
                    f"{tuple(x.shape)}; leave that layer out of lora_target_modules or set position_bias_enabled=False"
                )
            scale = scale.reshape(-1)
        return scale.to(x.device)

    def scale_input(self, linear: nn.Module, args: tuple) -> tuple:
        """A forward pre-hook for a merged linear: p (x W^T) = (p x) W^T, and the bias stays unscaled."""
        x, *rest = args
        return scale_rows(x, self.for_input(x)), *rest

    def _enter(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given = dict(zip(self._argument_names, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if tokens is None:
            raise ValueError("position bias needs input_ids or inputs_embeds in the model's call")
        batch, length = tokens.shape[:2]
        cache = given_cache(given)
        positions = logical_positions(
            batch,
            length,
            position_ids=given.get("position_ids"),
            attention_mask=given.get("attention_mask"),
            past_length=0 if cache is None else cache.get_seq_length(),
        )
        self._here.place.region = _Region(self.bias.buckets(positions).expand(batch, length))
        if backbone.training and torch.is_grad_enabled():
            self._watch_checkpoints(backbone)

    def _leave(self, backbone: nn.Module, args: tuple, output: Any) -> None:
        self._here.place.region = None

    def _watch_checkpoints(self, backbone: nn.Module) -> None:
        for module in backbone.modules():
            for attribute in CHECKPOINT_ATTRIBUTES:
                checkpoint = module.__dict__.get(attribute)
                if checkpoint is not None and not isinstance(checkpoint, _WatchedCheckpoint):
                    setattr(module, attribute, _WatchedCheckpoint(checkpoint, self))

    def checkpointed(self, checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """checkpoint(function, *args), where every run of the function has the positions of this forward."""
        region = self._here.place.region
        if region is None:
            return checkpoint(function, *args, **kwargs)
        if torch.compiler.is_compiling():
            # Python does not run a traced region again, and it may set nothing outside: the scale is made before
            region.scale(self.bias)
            return checkpoint(function, *args, **kwargs)

        def with_positions(*args: Any, **kwargs: Any) -> Any:
            place = self._here.place
            outer, place.region = place.region, _Region(region.buckets)
            try:
                return function(*args, **kwargs)
            finally:
                place.region = outer

        return checkpoint(with_positions, *args, **kwargs)


def has_position_scale(module: nn.Module) -> bool:
    """Whether a PositionScale already watches a module or scales its input."""
    return any(
        isinstance(getattr(hook, "__self__", None), PositionScale) for hook in module._forward_pre_hooks.values()
    )


class _Region:
    """A stretch of one forward pass that shares one computed scale."""

    def __init__(self, buckets: Tensor):
        self.buckets = buckets
        self._scale: Tensor | None = None
        self._has_graph = False

    def scale(self, bias: PositionBias) -> Tensor:
        if self._scale is None or self._has_graph != torch.is_grad_enabled():
            self._scale, self._has_graph = bias(self.buckets), torch.is_grad_enabled()
        return self._scale


class _Place:
    """Where one thread is."""

    region: _Region | None = None


class _PlaceOfThread(threading.local):
    """One _Place for every thread; a copy has new ones."""

    def __init__(self):
        # torch.compile follows what is set on an object of its own, but loses what is set on a thread's local
        self.place = _Place()

    def __reduce__(self):
        return _PlaceOfThread, ()


class _WatchedCheckpoint:
    """A checkpointing function that takes the positions along; an object, for a closure could not be pickled."""

    def __init__(self, checkpoint: Callable, positions: PositionScale):
        self.checkpoint = checkpoint
        self.positions = positions

    def __call__(self, function: Callable, *args: Any, **kwargs: Any) -> Any:
        return self.positions.checkpointed(self.checkpoint, function, *args, **kwargs)
