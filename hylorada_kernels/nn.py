"""Thin modules over the ops: they own the parameters and call one op; no mathematics is done here."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .layer_cache import Keeper, LayerCache, Operands
from .ops.hybrid_linear.eager import scale_rows
from .ops.hybrid_linear.op import TOKEN_SCALE_TARGETS, adapted_weight, hybrid_linear
from .ops.shifted_attention.op import shifted_attention

INITS = ("orthogonal", "kaiming")
BLEND_INIT = 0.1


class HybridLinear(nn.Module, Keeper):
    """A frozen linear layer with a trainable low-rank update; see `hylorada_kernels.hybrid_linear` for the formula.

    It holds the base layer's own weight and bias (the same Parameters, frozen) and computes exactly what the base
    layer computes until it is trained: lora_b starts at 0 and magnitude at the rows' norms.

    Parameters:
        weight: (O, I), or (I, O) for a transformers Conv1D; frozen.   bias: (O,) or None; frozen.
        lora_a: (R, I) fp32 (all of these fp64 for an fp64 base); orthonormal rows, or Kaiming-uniform.   lora_b: (O,
        R) fp32; zeros.
        magnitude: (O,) fp32; the norms of weight's rows. None for LoRA and rsLoRA.
        residual_weight: (1,) fp32; the logit of the blend, 0.1. None for DoRA.

    Build it with `from_linear`.
    """

    # nn.DataParallel sets it: its replicas share what is kept, on other devices
    _is_replica = False

    def __init__(
        self,
        linear: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout: float,
        use_rslora: bool,
        use_magnitude: bool,
        use_blend: bool,
        init: str,
        norm_grad: bool,
        token_scale_target: str,
        keep_scaled_weight: bool,
    ):
        super().__init__()
        _check_options(linear, rank, alpha, dropout, init, token_scale_target)
        if keep_scaled_weight and norm_grad:
            raise ValueError(
                "keep_scaled_weight=True keeps what norm_grad=True makes anew in every forward; leave one of them False"
            )
        self.weight_is_transposed = is_conv1d(linear)
        self.weight = linear.weight.requires_grad_(False)
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self.out_features, self.in_features = self._base().shape
        self.rank, self.alpha, self.dropout_p = rank, float(alpha), float(dropout)
        self.scale = lora_scale(rank, alpha, use_rslora)
        self.norm_grad, self.token_scale_target = norm_grad, token_scale_target
        self.merged = False
        self._original_weight: Tensor | None = None
        self._linear_class = type(linear)
        self._cache = LayerCache()
        self.keep_scaled_weight = keep_scaled_weight and use_magnitude

        own = {"device": self.weight.device, "dtype": torch.promote_types(self.weight.dtype, torch.float32)}
        self.lora_a = nn.Parameter(torch.empty(rank, self.in_features, **own))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, **own))
        init_lora_a(self.lora_a, init)
        self.register_parameter("magnitude", None)
        self.register_parameter("residual_weight", None)
        if use_magnitude:
            with torch.no_grad():
                self.magnitude = nn.Parameter(self._norm().clone())
            if use_blend:
                self.residual_weight = nn.Parameter(torch.full((1,), BLEND_INIT, **own))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        use_rslora: bool = True,
        use_magnitude: bool = True,
        use_blend: bool = True,
        init: str = "orthogonal",
        norm_grad: bool = False,
        token_scale_target: str = "output",
        keep_scaled_weight: bool = False,
    ) -> "HybridLinear":
        """Wrap an nn.Linear or a transformers Conv1D. The layer's weight and bias are frozen and shared, not copied.

        Args:
            linear: the layer to adapt; it is left usable, and must not be trained.
            rank: R >= 1.   alpha: the numerator of the scale.
            dropout: on the low-rank path while training, in [0, 1).
            use_rslora: scale alpha / sqrt(R), else alpha / R.
            use_magnitude: learn the rows' magnitude (DoRA).
            use_blend: blend it with the plain update (HyLoRADA); ignored without it.
            init: of lora_a, "orthogonal" or "kaiming".
            norm_grad: let the gradient through the norm (DoRA section 4.3 does not); ignored without a magnitude.
            token_scale_target: what a position scale multiplies, the whole "output" or the low-rank "delta".
            keep_scaled_weight: on the CPU, keep the weight with its gain, as much memory again as the weight; made
                anew after every optimizer step, it pays with accumulation, and rounds 16-bit weights once more.
                Ignored without a magnitude.

        Raises:
            TypeError: not a linear layer.   ValueError: an option out of range.
        """
        return cls(
            linear, rank, alpha,
            dropout=dropout, use_rslora=use_rslora, use_magnitude=use_magnitude, use_blend=use_blend, init=init,
            norm_grad=norm_grad, token_scale_target=token_scale_target, keep_scaled_weight=keep_scaled_weight,
        )  # fmt: skip

    def forward(self, x: Tensor, token_scale: Tensor | None = None) -> Tensor:
        """x: (..., I) in weight's dtype; token_scale: x.shape[:-1] or None. -> (..., O)."""
        if self.merged:
            return self._merged_forward(x, token_scale)
        operands = self._operands()
        norm, kept_gain = self._cache.norm_and_gain(operands) if self._keeps() else (None, None)
        return hybrid_linear(
            x,
            operands.weight,
            operands.lora_a,
            operands.lora_b,
            operands.magnitude,
            operands.blend,
            scale=self.scale,
            bias=self.bias,
            norm=norm,
            token_scale=token_scale,
            token_scale_target=self.token_scale_target,
            norm_grad=self.norm_grad,
            dropout_p=self.dropout_p if self.training else 0.0,
            kept_gain=kept_gain,
        )

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """diag(g) (W + s B A) in the weight's dtype and layout; of a merged layer, its weight."""
        if self.merged:
            return self.weight.detach().clone()
        norm = None if self.magnitude is None else self._norm()
        merged = adapted_weight(
            self._base(), self.lora_a, self.lora_b, self.magnitude, self.residual_weight, scale=self.scale, norm=norm
        )
        return (merged.T if self.weight_is_transposed else merged).contiguous()

    @torch.no_grad()
    def merge(self, keep_base: bool = True) -> None:
        """Replace the weight by the adapted one. `keep_base` keeps the original on the CPU for `unmerge`."""
        if self.merged:
            return
        merged = self.merged_weight()
        self._original_weight = self.weight.detach().to("cpu", copy=True) if keep_base else None
        self.weight.copy_(merged)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, bit for bit."""
        if not self.merged:
            return
        if self._original_weight is None:
            raise RuntimeError(
                "the layer was merged with keep_base=False, its original weight is gone; reload the base model"
            )
        self.weight.copy_(self._original_weight)
        self._original_weight = None
        self.merged = False

    def invalidate_norm(self) -> None:
        """Forget what is kept of the weight, its norm above all; see `norm_cache` for when that is needed."""
        self._cache.invalidate()

    def to_linear(self) -> nn.Module:
        """A plain layer of the original's class that shares the weight and bias as they are now, merged or not."""
        if self.weight_is_transposed:
            linear = self._linear_class(self.out_features, self.in_features)
        else:
            linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear.train(self.training)

    def kept(self) -> Iterator[tuple[LayerCache, Operands]]:
        """See `layer_cache.refresh`."""
        if self._keeps():
            yield self._cache, self._operands()

    def extra_repr(self) -> str:
        kind = "lora" if self.magnitude is None else "dora" if self.residual_weight is None else "hylorada"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {kind}, "
            f"rank={self.rank}, scale={self.scale:.4g}, dropout={self.dropout_p}, merged={self.merged}"
        )

    def _base(self) -> Tensor:
        """The weight as (O, I), a view."""
        weight = self.weight
        return weight.T if self.weight_is_transposed else weight

    def _operands(self) -> Operands:
        return Operands(
            self._base(),
            self.lora_a,
            self.lora_b,
            self.magnitude,
            self.residual_weight,
            self.scale,
            self.keep_scaled_weight,
        )

    def _keeps(self) -> bool:
        """Whether the norm is kept from forward to forward."""
        return not (self.norm_grad or self.merged or self._is_replica)

    def _norm(self) -> Tensor:
        return self._cache.norms.norm(self._base(), self.lora_a, self.lora_b, self.scale)

    def _merged_forward(self, x: Tensor, token_scale: Tensor | None) -> Tensor:
        if token_scale is None:
            return F.linear(x, self._base(), self.bias)
        if self.token_scale_target == "delta":
            raise RuntimeError(
                "a position scale of the low-rank part cannot act on a merged weight; call unmerge() first"
            )
        y = scale_rows(F.linear(x, self._base()), token_scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D, a linear layer with weight (I, O); known by name, to not import it."""
    return any(cls.__name__ == "Conv1D" for cls in type(module).__mro__) and hasattr(module, "nf")


def _check_options(
    linear: nn.Module, rank: int, alpha: float, dropout: float, init: str, token_scale_target: str
) -> None:
    # a subclass may compute anything; one that keeps nn.Linear's forward computes the same
    is_linear = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if not (is_linear or is_conv1d(linear)):
        own = " with a forward of its own" if isinstance(linear, nn.Linear) else ""
        raise TypeError(f"only nn.Linear and transformers' Conv1D can be adapted, got {type(linear).__name__}{own}")
    if not linear.weight.dtype.is_floating_point:
        raise TypeError(f"the weight is {linear.weight.dtype}, not floating point; dequantise the layer first")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")
    if not _is_number(alpha) or not math.isfinite(alpha) or alpha <= 0:
        raise ValueError(f"alpha must be a positive number, got {alpha!r}")
    if not _is_number(dropout) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be a number in [0, 1), got {dropout!r}")
    if init not in INITS:
        raise ValueError(f"init must be one of {INITS}, got {init!r}")
    if token_scale_target not in TOKEN_SCALE_TARGETS:
        raise ValueError(f"token_scale_target must be one of {TOKEN_SCALE_TARGETS}, got {token_scale_target!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def lora_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / sqrt(R) (rsLoRA; Kalajdzievski 2023), else alpha / R."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def init_lora_a(lora_a: Tensor, init: str) -> None:
    if init == "orthogonal":
        nn.init.orthogonal_(lora_a)
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))


class ShiftedAttention(nn.Module):
    """Attention within groups of tokens; see `hylorada_kernels.shifted_attention`. It has no parameters.

    Args:
        group_size: tokens of a group.   shift: of the groups' borders, in [0, group_size).
        shifted_heads: which heads that shift is for, "none", "half" or "all".   causal: see no later token.
        sink_tokens: how many first tokens every token sees.
        dropout: of the softmax while training, in [0, 1).
    """

    def __init__(
        self,
        group_size: int,
        shift: int = 0,
        shifted_heads: str = "none",
        causal: bool = True,
        sink_tokens: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.group_size, self.shift, self.shifted_heads = group_size, shift, shifted_heads
        self.causal, self.sink_tokens, self.dropout_p = causal, sink_tokens, float(dropout)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """q: (B, Hq, L, D), k, v: (B, Hkv, L, D) -> (B, Hq, L, D)."""
        return shifted_attention(
            q,
            k,
            v,
            group_size=self.group_size,
            shift=self.shift,
            shifted_heads=self.shifted_heads,
            causal=self.causal,
            sink_tokens=self.sink_tokens,
            scale=scale,
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            dropout_p=self.dropout_p if self.training else 0.0,
        )

    def extra_repr(self) -> str:
        return (
            f"group_size={self.group_size}, shift={self.shift}, shifted_heads={self.shifted_heads!r}, "
            f"causal={self.causal}, sink_tokens={self.sink_tokens}, dropout={self.dropout_p}"
        )
