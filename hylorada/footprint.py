"""Counts what a training step holds in memory, by running it on tensors that have a size and no contents."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hylorada_kernels import using
from hylorada_kernels.nn import HybridLinear
from hylorada_kernels.ops.column_norm import op as column_norm_op
from hylorada_kernels.ops.hybrid_linear import op as hybrid_linear_op
from hylorada_kernels.ops.shifted_attention import op as shifted_attention_op

from .evaluation import batch_loss_sum
from .pretrained import DTYPES

LOGITS = "logits and loss"
TEMPORARIES = "temporaries"
# what stays from step to step
LASTING = ("weights", "buffers", "adapter", "kept norms", "optimizer", "gradients")

_ATEN = torch.ops.aten
_SCALARS = (_ATEN._local_scalar_dense.default, _ATEN.is_nonzero.default, _ATEN.item.default)
_OWN: Any = torch.ops.hylorada
# what an op allocates on its way is counted too: these run inside of the registered ops
_INSIDE: dict[Any, Callable[..., Any]] = {
    _OWN.column_norm.default: column_norm_op._forward,
    _OWN.hybrid_linear.default: hybrid_linear_op._forward,
    _OWN.hybrid_linear_backward.default: hybrid_linear_op._backward,
    _OWN.shifted_attention.default: shifted_attention_op._forward,
    _OWN.shifted_attention_backward.default: shifted_attention_op._backward,
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step, counted storage by storage.

    lasting: of LASTING: the base model's parameters; buffers; parameters that were added; what the adapted layers
        keep to know their norms by; AdamW's state; gradients.
    kept: what the forward pass leaves for the backward, by the class of the module that made it; the output head's and
        the loss's are "logits and loss".
    at_peak: everything at the fullest moment, by the same names; what the backward makes for itself is "temporaries".
    peak: the sum of that.   stage: "optimizer", "forward" or "backward", where the fullest moment lies.
    """

    lasting: dict[str, int]
    kept: dict[str, int]
    at_peak: dict[str, int]
    peak: int
    stage: str


def training_footprint(
    model: nn.Module, adapter: Iterable[nn.Parameter], seq_len: int, batch_size: int = 1, mixed_precision: str = "fp32"
) -> Footprint:
    """Count one step of AdamW on (batch_size, seq_len) tokens without padding; nothing is computed.

    The step is the model's own, with its checkpointing, attention and mixed precision, and the trainer's loss, in train
    mode, as the eager path takes it on the CPU. Nothing trainable: a forward pass without gradients. Not counted:
    what libraries hold (a CUDA context, workspaces of BLAS), the allocator's fragments, the data.

    Args:
        model: with parameters on any device, "meta" included. It is what it was when this returns.
        adapter: the parameters that were added to the base model.   mixed_precision: "fp32", "bf16" or "fp16" autocast.
    """
    ledger = _Ledger()
    labels = dict.fromkeys(map(id, adapter), "adapter")
    step = _Step(model, ledger, batch_size, seq_len, DTYPES[mixed_precision])
    with ExitStack() as stack:
        fakes = _fakes(step, ledger, labels)
        stack.enter_context(_train_mode(model))
        stack.enter_context(_following_modules(model, ledger))
        stack.enter_context(using("eager"))
        stack.enter_context(ledger)
        functional_call(step, fakes)
    lasting = {name: ledger.lasting[name] for name in LASTING}
    kept = {name: size for name, size in step.kept.items() if size and name not in LASTING}
    return Footprint(lasting, kept, ledger.at_peak, ledger.peak, ledger.peak_stage)


class _Step(nn.Module):
    """The whole step inside one forward, so that a recomputation finds the parameters that the forward had."""

    def __init__(self, model: nn.Module, ledger: _Ledger, batch_size: int, seq_len: int, autocast: torch.dtype) -> None:
        super().__init__()
        self.model, self.ledger, self.autocast = model, ledger, autocast
        # an ordinary tensor: transformers takes another mask where the tokens are fake
        self.batch = {"input_ids": torch.zeros(batch_size, seq_len, dtype=torch.long)}
        self.kept: Counter[str] = Counter()

    def forward(self) -> None:
        ledger = self.ledger
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for module in self.model.modules():
            ledger.reserve("kept norms", _kept_bytes(module))
        if trained:
            self._optimizer_step(trained)
        ledger.begin("forward", LOGITS)
        with (
            nullcontext() if trained else torch.no_grad(),
            torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast != torch.float32),
        ):
            loss, _ = batch_loss_sum(self.model, self.batch)
        self.kept = Counter(ledger.held)
        if not trained:
            return
        ledger.begin("backward", TEMPORARIES)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda leaf: ledger.rename(leaf.grad, "gradients"))
        loss.backward()
        ledger.lasting["gradients"] = ledger.held["gradients"]

    def _optimizer_step(self, trained: list[nn.Parameter]) -> None:
        self.ledger.begin("optimizer", "gradients")
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        self.ledger.begin("optimizer", "optimizer")
        self.optimizer = torch.optim.AdamW(trained, foreach=False)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ledger.lasting["optimizer"] = self.ledger.held["optimizer"]


class _Ledger(TorchDispatchMode):
    """Sees every storage come and go, and knows what it is for and when there was most.

    A value that the code asks for is given as the usual one: 0, or False, for every check here asks for a rare case.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: Counter[str] = Counter()
        self.lasting: Counter[str] = Counter()
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.peak_stage = ""
        self.modules: list[str] = []
        self._stage, self._default = "", ""
        self._living: dict[int, tuple[weakref.ref, str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _SCALARS and isinstance(args[0], FakeTensor):
            return False if args[0].dtype == torch.bool else 0
        if func in _INSIDE:
            with self:
                return _distinct(_INSIDE[func](*args, **kwargs))
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor, self.modules[-1] if self.modules else self._default)
        return out

    def begin(self, stage: str, default: str) -> None:
        """From now on; `default`: the name of what no module makes."""
        self._stage, self._default = stage, default

    def add(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._living or not size:
            return
        self._living[key] = (weakref.ref(storage, lambda _: self._forget(key)), name, size)
        self._grow(name, size)

    def reserve(self, name: str, size: int) -> None:
        """Count what no tensor stands for."""
        self.lasting[name] += size
        self._grow(name, size)

    def rename(self, tensor: Tensor | None, name: str) -> None:
        assert tensor is not None
        key = tensor.untyped_storage()._cdata
        reference, old, size = self._living[key]
        self._living[key] = (reference, name, size)
        self.held[old] -= size
        self.held[name] += size

    def _grow(self, name: str, size: int) -> None:
        self.held[name] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.peak_stage = self.total, self._stage
            self.at_peak = {name: size for name, size in self.held.items() if size}

    def _forget(self, key: int) -> None:
        _, name, size = self._living.pop(key)
        self.held[name] -= size
        self.total -= size


def _distinct(tensors: Any) -> Any:
    """As the registered ops return them: no empty tensor twice."""
    if isinstance(tensors, Tensor):
        return tensors
    return type(tensors)(tensor if tensor.numel() else torch.empty_like(tensor) for tensor in tensors)


def _fakes(step: nn.Module, ledger: _Ledger, labels: dict[int, str]) -> dict[str, Tensor]:
    """A fake for every parameter and buffer, one for all names of a shared one."""
    made: dict[int, Tensor] = {}
    fakes = {}
    named = [*step.named_parameters(remove_duplicate=False), *step.named_buffers(remove_duplicate=False)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name, given in named:
            if id(given) not in made:
                fake = torch.empty_strided(given.size(), given.stride(), dtype=given.dtype, device="cpu")
                label = "buffers"
                if isinstance(given, nn.Parameter):
                    fake = nn.Parameter(fake, requires_grad=given.requires_grad)
                    label = labels.get(id(given), "weights")
                made[id(given)] = fake
                ledger.add(fake, label)
                ledger.lasting[label] = ledger.held[label]
            fakes[name] = made[id(given)]
    return fakes


def _kept_bytes(module: nn.Module) -> int:
    """What an adapted layer keeps between optimizer steps: norm and gain, and copies that show whether they hold.

    That is the norm, once more as it was given, and that of the weight alone; the gain with its two derivatives; copies
    of A, B and m; A, if it is of another dtype, and s B^T in the weight's dtype; where it is asked for, the scaled
    weight and B. Samples of the weight and single numbers are left out.
    """
    if not isinstance(module, HybridLinear) or module.magnitude is None or module.norm_grad or module.merged:
        return 0
    rows = module.magnitude.nbytes * (6 if module.residual_weight is None else 7)
    weight: Tensor = module._base()
    up = module.lora_b.numel() * weight.element_size()
    down = 0 if module.lora_a.dtype == weight.dtype else module.lora_a.numel() * weight.element_size()
    scaled = weight.nbytes + up if module.keep_scaled_weight else 0
    return module.lora_a.nbytes + module.lora_b.nbytes + rows + down + up + scaled


@contextmanager
def _train_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _following_modules(model: nn.Module, ledger: _Ledger) -> Iterator[None]:
    """Tell the ledger which module runs: the innermost, and for the whole model and its head the loss."""
    base: Any = model
    outermost = (model, getattr(base, "base_model", None), base.get_output_embeddings())
    handles = []
    for module in model.modules():
        name = LOGITS if any(module is other for other in outermost) else type(module).__name__

        def enter(_: nn.Module, args: Any, name: str = name) -> None:
            ledger.modules.append(name)

        def leave(*_: Any) -> None:
            ledger.modules.pop()

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        # a checkpointed layer ends its recomputation by an exception
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
