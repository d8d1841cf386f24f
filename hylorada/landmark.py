"""LandmarkLoRA: a few learned vectors, mixed by a gate, added to the hidden states that the output head receives."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers import Cache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from .position import CACHE_ARGUMENTS, bucket_starts, given_cache, logical_positions

INIT_STD = 0.02


class LandmarkLoRA(nn.Module):
    """h'_t = h_t + gamma softmax(z_t) landmarks, where z_t = gate m_t [+ position[bucket(t)]]; h at the start.

    m_t is h_t ("token"), the mean of h_s for s <= t in t's document ("prefix_mean"), or the mean over the whole
    document ("sequence_mean", which lets a token see later ones). What is averaged is gate h_t: a text is summed up in
    K numbers and a count, at least in fp32.

    Parameters (K landmarks, I hidden features), all fp32:
        landmarks: (K, I); normal, 0.02.   gate: (K, I); normal, 0.02.   gamma: (1,); zero.
        position: (num_buckets, K), by the logarithmic buckets of PositionBias; zeros. None for num_buckets 0.
    """

    starts: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_landmarks: int = 8,
        gate: str = "token",
        num_buckets: int = 0,
        max_length: int = 32768,
        device: Any = None,
    ):
        super().__init__()
        if gate not in ("token", "prefix_mean", "sequence_mean"):
            raise ValueError(f"gate must be 'token', 'prefix_mean' or 'sequence_mean', got {gate!r}")
        if num_buckets and max_length <= num_buckets // 4:
            raise ValueError(f"max_length must exceed a quarter of num_buckets={num_buckets}, got {max_length}")
        self.input_of_gate = gate
        self.landmarks = nn.Parameter(INIT_STD * torch.randn(num_landmarks, hidden_size, device=device))
        self.gate = nn.Parameter(INIT_STD * torch.randn(num_landmarks, hidden_size, device=device))
        self.gamma = nn.Parameter(torch.zeros(1, device=device))
        self.register_parameter("position", None)
        if num_buckets:
            self.position = nn.Parameter(torch.zeros(num_buckets, num_landmarks, device=device))
            starts = torch.tensor(bucket_starts(num_buckets, max_length, "log")[1:], device=device)
            self.register_buffer("starts", starts, persistent=False)

    def gate_logits(self, hidden: Tensor) -> Tensor:
        """hidden: (..., I) -> (..., K)."""
        logits = linear(hidden, self.gate.to(hidden.dtype))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def position_logits(self, positions: Tensor) -> Tensor:
        """positions: any shape, int64 -> (..., K)."""
        positions = positions.to(self.starts.device).contiguous()
        return self.position[torch.bucketize(positions, self.starts, right=True)]

    def forward(self, hidden: Tensor, logits: Tensor) -> Tensor:
        """hidden: (..., I), logits: (..., K) -> (..., I), in hidden's dtype."""
        # gamma scales K rows, so that no second tensor of hidden's size is kept for the backward
        landmarks = (self.gamma * self.landmarks).to(hidden.dtype)
        return hidden + (logits.softmax(-1).to(hidden.dtype) @ landmarks).to(hidden.dtype)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.landmarks.shape))}, gate={self.input_of_gate!r}"


def running_sums(values: Tensor, starts: Tensor | None = None, past: Tensor | None = None) -> Tensor:
    """Sums of the values up to every token, anew from every start.

    A parallel scan in about log2(L) steps: no document enters another one's sums, not even by a rounding.

    values: (B, L, C).   starts: (B, L) bool.   past: (B, C), what came before the first token. -> (B, L, C)
    """
    length = values.shape[1]
    columns = torch.arange(length, device=values.device)
    if past is not None:
        first = past if starts is None else past.masked_fill(starts[:, :1], 0)
        values = torch.cat([values[:, :1] + first.unsqueeze(1), values[:, 1:]], 1)
    first_columns = None if starts is None else _first_columns(starts, columns)
    step = 1
    while step < length:
        earlier = pad(values[:, :-step], (0, 0, step, 0))
        if first_columns is not None:
            earlier = earlier.masked_fill((columns - step < first_columns).unsqueeze(-1), 0)
        values = values + earlier
        step *= 2
    return values


def find_head_input(model: PreTrainedModel) -> tuple[nn.Module, Tensor]:
    """The innermost module that takes token ids and whose output the head receives, and that output for one token.

    It is found by a forward pass. ValueError for models without an output head, or that change the hidden states in
    between.
    """
    name = type(model).__name__
    head = model.get_output_embeddings()
    if head is None or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"landmarks: {name} is no decoder with an output head; set landmark_enabled=False")
    outputs: dict[nn.Module, Any] = {}
    inputs: list[Tensor] = []

    def keep_output(module, args, output):
        outputs[module] = output[0]

    candidates = [module for module in model.modules() if module is not model and _takes(module, "input_ids")]
    handles = [module.register_forward_hook(keep_output) for module in candidates]
    handles.append(head.register_forward_pre_hook(lambda module, args: inputs.append(args[0])))
    try:
        _run(model, [0])
    finally:
        for handle in handles:
            handle.remove()
    for module in reversed(candidates):
        if module in outputs and inputs and _same_memory(outputs[module], inputs[0]):
            return module, outputs[module]
    raise ValueError(
        f"landmarks: no module of {name} that takes token ids gives its output to the head unchanged; "
        "set landmark_enabled=False"
    )


def check_gate(model: PreTrainedModel, backbone: nn.Module, gate: str) -> None:
    """ValueError where a gate would show later tokens to earlier ones, or has no place for its sums while decoding."""
    name = type(model).__name__
    if gate == "prefix_mean" and not any(_takes(backbone, argument) for argument in CACHE_ARGUMENTS):
        raise ValueError(
            f'landmark_gate="prefix_mean" keeps its sums in the cache, and {name} takes none of '
            f'{", ".join(CACHE_ARGUMENTS)}; use "token"'
        )
    if gate == "sequence_mean":
        first, second = (_run(backbone, tokens)[:, 0] for tokens in ([0, 0], [0, 1]))
        if torch.equal(first, second):
            raise ValueError(
                f'landmark_gate="sequence_mean" would show later tokens to earlier ones, and {name} is causal; use '
                '"prefix_mean" or "token"'
            )


class LandmarkSums(DynamicLayer):
    """What a cache remembers of the landmarks of its texts: the running sums after every token, K + 1 floats each.

    It stands behind the layers of the model in `Cache.layers`, and so it is reordered, repeated, selected, cropped,
    reset and copied with them. As keys it has the shape (B, 1, L, K + 1).
    """

    @classmethod
    def of(cls, cache: Cache, past_length: int) -> "LandmarkSums | None":
        """The sums in a cache with `past_length` tokens; None for an empty one."""
        # a static cache chooses the model's masks by all its layers, an offloaded one moves what it has by their number
        if isinstance(cache, EncoderDecoderCache) or cache.is_compileable or cache.offloading:
            raise TypeError(
                f'landmark_gate="prefix_mean" cannot keep its sums in this {type(cache).__name__} (static: '
                f"{cache.is_compileable}, offloaded: {getattr(cache, 'offloading', False)}); use a cache that grows, "
                'cache_implementation="dynamic", or landmark_gate="token"'
            )
        sums = next((layer for layer in cache.layers if isinstance(layer, cls)), None)
        known = 0 if sums is None else sums.get_seq_length()
        if known != past_length:
            raise ValueError(
                f'landmark_gate="prefix_mean" has sums of {known} tokens in a cache of {past_length} tokens; fill the '
                "cache with this model"
            )
        return sums

    def last(self) -> Tensor | None:
        """(B, K + 1), after the latest token."""
        return self.keys[:, 0, -1] if self.keys is not None and self.get_seq_length() else None

    def append(self, sums: Tensor) -> None:
        """sums: (B, L, K + 1), of the next L tokens."""
        self.update(sums.unsqueeze(1), sums.unsqueeze(1)[..., :0])


class LandmarkHook:
    """Adds the landmarks to what a backbone gives to the head, from its construction until `remove`.

    It has no memory of its own: everything is in the arguments and the output of the call, and in its cache. Where the
    output holds the hidden states of every layer, the last of them changes too.

    Args:
        landmarks: the LandmarkLoRA.   backbone: of `find_head_input`.
    """

    def __init__(self, landmarks: LandmarkLoRA, backbone: nn.Module):
        self.landmarks = landmarks
        self._argument_names = list(inspect.signature(backbone.forward).parameters)
        self._handle = backbone.register_forward_hook(self._add, with_kwargs=True)

    def remove(self) -> None:
        """The backbone gives what it gave before."""
        self._handle.remove()

    def _add(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        given = dict(zip(self._argument_names, args, strict=False)) | kwargs
        hidden = output[0]
        cache = given_cache(given)
        if cache is None:
            values = output.values() if isinstance(output, ModelOutput) else output
            cache = next((value for value in values if isinstance(value, Cache)), None)
        logits = self.landmarks.gate_logits(hidden)
        if self.landmarks.input_of_gate != "token":
            logits = self._averaged(logits, given, cache)
        if self.landmarks.position is not None:
            positions = logical_positions(
                *hidden.shape[:2],
                position_ids=given.get("position_ids"),
                attention_mask=given.get("attention_mask"),
                past_length=_past_length(cache, hidden),
            )
            logits = logits + self.landmarks.position_logits(positions).to(logits.device)
        return _exchanged(output, hidden, self.landmarks(hidden, logits))

    def _averaged(self, logits: Tensor, given: Mapping[str, Any], cache: Cache | None) -> Tensor:
        whole = self.landmarks.input_of_gate == "sequence_mean"
        past_length = int(_past_length(cache, logits))
        if whole and past_length:
            raise ValueError('landmark_gate="sequence_mean" needs the whole text in one call; pass no filled cache')
        kept = None if whole or cache is None else LandmarkSums.of(cache, past_length)
        valid, starts = _documents(given, logits.shape[0], logits.shape[1], past_length)
        values = torch.cat([logits, torch.ones_like(logits[..., :1])], -1)
        if valid is not None:
            valid = valid.to(logits.device)
            values = values.masked_fill(~valid.unsqueeze(-1), 0)
        if starts is not None:
            starts = starts.to(logits.device).expand(logits.shape[:2])
            starts = starts if valid is None else starts & valid
        sums = running_sums(values, starts, None if kept is None else kept.last())
        if whole:
            sums = sums.gather(1, _last_columns(sums, starts).unsqueeze(-1).expand_as(sums))
        elif cache is not None and int(cache.get_seq_length()):
            _kept_in(cache, kept).append(sums)
        return sums[..., :-1] / sums[..., -1:].clamp(min=1)


def has_landmarks(module: nn.Module) -> bool:
    """Whether a LandmarkHook acts on a module."""
    return any(isinstance(getattr(hook, "__self__", None), LandmarkHook) for hook in module._forward_hooks.values())


def _takes(module: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(module.forward).parameters


def _run(module: nn.Module, tokens: list[int]) -> Any:
    """The first output of a forward pass without dropout, gradients or other traces."""
    training = [part for part in module.modules() if part.training]
    device = next(module.parameters()).device
    try:
        for part in training:
            part.training = False
        with torch.no_grad():
            return module(input_ids=torch.tensor([tokens], device=device))[0]
    finally:
        for part in training:
            part.training = True


def _same_memory(output: Any, received: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.shape[-1] == received.shape[-1]
        and output.untyped_storage().data_ptr() == received.untyped_storage().data_ptr()
    )


def _past_length(cache: Cache | None, hidden: Tensor) -> Any:
    """Tokens in the cache before the call that has just filled it; a checkpointed call fills none."""
    return 0 if cache is None else max(cache.get_seq_length() - hidden.shape[1], 0)


def _documents(
    given: Mapping[str, Any], batch: int, length: int, past_length: int
) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens are no padding, (B, L), and which begin a document, (B or 1, L); None where no argument says it."""
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        what = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else f"type {type(mask).__name__}"
        raise ValueError(
            "the mean of a landmark gate needs an attention_mask of shape (batch, length) that marks padding, got one "
            f'of {what}; pass that, or use landmark_gate="token"'
        )
    if positions is None and given.get("cu_seq_lens_q") is not None:
        raise ValueError("the mean of a landmark gate needs position_ids that restart at 0 beside cu_seq_lens_q")
    valid = None
    if mask is not None:
        begin = past_length if mask.shape[1] >= past_length + length else mask.shape[1] - length
        valid = mask[:, begin : begin + length] != 0
    if positions is None:
        return valid, None
    return valid, logical_positions(
        batch, length, position_ids=positions, attention_mask=None, past_length=past_length
    ) == 0


def _first_columns(starts: Tensor, columns: Tensor) -> Tensor:
    """For every token the column where its document begins; (B, L)."""
    return torch.where(starts, columns, 0).cummax(1).values


def _last_columns(sums: Tensor, starts: Tensor | None) -> Tensor:
    """For every token the column where its document ends; (B, L)."""
    batch, length = sums.shape[:2]
    if starts is None:
        return torch.full((batch, length), length - 1, device=sums.device)
    columns = torch.arange(length, device=sums.device)
    is_last = pad(starts[:, 1:], (0, 1), value=True)
    return torch.where(is_last, columns, length).flip(1).cummin(1).values.flip(1)


def _kept_in(cache: Cache, kept: LandmarkSums | None) -> LandmarkSums:
    if kept is None:
        kept = LandmarkSums()
        # a cache tells by its layers what masks its model needs, and this is no other kind of layer
        kept.is_sliding = getattr(cache.layers[-1], "is_sliding", False)
        cache.layers.append(kept)
    return kept


def _exchanged(output: Any, old: Tensor, new: Tensor) -> Any:
    """The output with `new` in the place of `old`, its first entry."""
    if not isinstance(output, ModelOutput):
        return (new, *(_with_last(value, old, new) for value in output[1:]))
    for name, value in output.items():
        output[name] = new if value is old else _with_last(value, old, new)
    return output


def _with_last(states: Any, old: Tensor, new: Tensor) -> Any:
    return (*states[:-1], new) if isinstance(states, tuple) and states and states[-1] is old else states
