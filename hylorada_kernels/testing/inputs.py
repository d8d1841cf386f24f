"""One factory for the inputs of an adapted linear."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass
class LinearInputs:
    """Arguments of `hybrid_linear`, plus the gradient that comes back from above."""

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor | None
    blend: Tensor | None
    bias: Tensor | None
    token_scale: Tensor | None
    dy: Tensor
    scale: float
    token_scale_target: str = "output"

    TRAINED = ("x", "lora_a", "lora_b", "magnitude", "blend", "bias", "token_scale")

    def arguments(self) -> dict:
        """Keyword arguments for `hybrid_linear`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "dy"}

    def map(self, function) -> "LinearInputs":
        """A copy with every tensor replaced by function(tensor)."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})

    def requiring_grad(self) -> "LinearInputs":
        """A copy of detached leaves in which all that can be trained, and x, ask for a gradient."""
        copy = self.map(lambda tensor: tensor.detach())
        for name in self.TRAINED:
            if getattr(copy, name) is not None:
                getattr(copy, name).requires_grad_(True)
        return copy

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that a backward pass left in the leaves."""
        found = {name: getattr(self, name) for name in self.TRAINED}
        return {name: leaf.grad for name, leaf in found.items() if leaf is not None and leaf.grad is not None}


def linear_inputs(
    tokens: int | tuple[int, ...],
    in_features: int,
    out_features: int,
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    magnitude: bool = True,
    blend: bool = True,
    bias: bool = True,
    token_scale: bool = True,
    token_scale_target: str = "output",
    scale: float = 0.7,
    seed: int = 0,
) -> LinearInputs:
    """Random inputs away from the initial state: B is not 0, m is not the norm.

    x, weight, bias and dy have `dtype`, all else fp32 (fp64 for fp64).
    """
    device = device or torch.get_default_device()
    generator = torch.Generator("cpu").manual_seed(seed)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    leading = (tokens,) if isinstance(tokens, int) else tuple(tokens)

    def normal(*shape: int, to: torch.dtype, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu") * std).to(to).to(device)

    fan_in = max(in_features, 1) ** -0.5
    weight = normal(out_features, in_features, to=dtype, std=fan_in)
    return LinearInputs(
        x=normal(*leading, in_features, to=dtype),
        weight=weight,
        lora_a=normal(rank, in_features, to=own, std=fan_in),
        lora_b=normal(out_features, rank, to=own, std=0.5 * max(rank, 1) ** -0.5),
        magnitude=weight.to(own).norm(dim=1) * normal(out_features, to=own, std=0.2).exp() if magnitude else None,
        blend=normal(1, to=own) if blend and magnitude else None,
        bias=normal(out_features, to=dtype, std=0.5) if bias else None,
        token_scale=1 + normal(*leading, to=own, std=0.2) if token_scale else None,
        dy=normal(*leading, out_features, to=dtype),
        scale=scale,
        token_scale_target=token_scale_target,
    )
