"""Sparse adapters, a baseline: a small bottleneck behind every MLP, of which a learned choice of units is active."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .lora import find_targets

# the last linear of an MLP in transformers' models, whose output is the MLP's
MLP_OUTPUTS = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "mlp.fc_out", "fc2")


class SparseAdapter(nn.Module):
    """y = f + Up(gelu(mask * Down f)), f itself at the start. The mask keeps the `active` units of the highest scores.

    The scores are parameters, no function of the input. They get the gradient of a sigmoid in the mask's place
    (straight-through; Bengio et al. 2013), so that a unit that is off can come on.

    Parameters:
        down: (units, features).   up: (features, units); zeros.   scores: (units,); zeros and a little noise.
    """

    def __init__(self, features: int, units: int, active: int, dtype: torch.dtype | None = None, device=None):
        if not 1 <= active <= units:
            raise ValueError(f"active must be from 1 to units={units}, got {active}")
        super().__init__()
        self.active = active
        options = {"dtype": dtype, "device": device}
        self.down = nn.Parameter(torch.empty(units, features, **options))
        self.up = nn.Parameter(torch.zeros(features, units, **options))
        self.scores = nn.Parameter(torch.empty(units, **options))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        # equal scores would leave the choice to the sort
        nn.init.normal_(self.scores, std=1e-2)

    def mask(self) -> Tensor:
        """(units,): 1 for the active units and 0 for the others, with a sigmoid's gradient."""
        soft = self.scores.sigmoid()
        hard = torch.zeros_like(soft).index_fill(0, self.scores.topk(self.active).indices, 1.0)
        return hard + (soft - soft.detach())

    def forward(self, f: Tensor) -> Tensor:
        """f: (..., features) -> the same."""
        return f + F.linear(F.gelu(self.mask() * F.linear(f, self.down)), self.up)


def find_mlp_outputs(model: nn.Module) -> dict[str, nn.Module]:
    """The linear at the end of every MLP, by its name; ValueError where there is none."""
    try:
        return find_targets(model, MLP_OUTPUTS, warn_unmatched=False)
    except ValueError as error:
        raise ValueError(f"sparse adapters found no MLP: {error}") from None


def add_sparse_adapters(model: nn.Module, units: int, active: int) -> None:
    """Freeze a model and put a trainable SparseAdapter behind every MLP."""
    linears = find_mlp_outputs(model).values()
    model.requires_grad_(False)
    for linear in linears:
        weight = linear.get_parameter("weight")
        # nn.Linear keeps (out, in), Conv1D (in, out)
        features = weight.shape[0] if isinstance(linear, nn.Linear) else weight.shape[1]
        linear.add_module("sparse_adapter", SparseAdapter(features, units, active, weight.dtype, weight.device))
        linear.register_forward_hook(_adapt)


def _adapt(linear: nn.Module, args: tuple, output: Tensor) -> Tensor:
    return linear.get_submodule("sparse_adapter")(output)
