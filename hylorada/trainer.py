"""The training loop: token-weighted loss, gradient accumulation, mixed precision, on any number of processes."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import SchedulerType, get_scheduler

from .config import real_number, whole_number
from .evaluation import batch_loss_sum, mean_loss, predicted_tokens
from .model import get_lora_plus_param_groups

logger = logging.getLogger(__name__)

_AUTOCAST_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# they need arguments that the config does not have
_UNSUPPORTED_SCHEDULERS = {
    "cosine_warmup_with_min_lr",
    "cosine_with_min_lr",
    "greedy",
    "reduce_lr_on_plateau",
    "warmup_stable_decay",
}
_SCHEDULERS = sorted({kind.value for kind in SchedulerType} - _UNSUPPORTED_SCHEDULERS)
_OPTIONAL_COUNTS = ("per_device_batch_size", "max_steps", "eval_steps")
_OPTIONAL_NUMBERS = ("magnitude_learning_rate", "position_learning_rate", "max_grad_norm")


@dataclass
class TrainingConfig:
    """How to train.

    num_epochs: passes over the training data
    learning_rate: of the low-rank matrices, and of every parameter without a rate of its own
    magnitude_learning_rate, position_learning_rate: None takes learning_rate
    per_device_batch_size: what the given dataloader must have; None takes the dataloader's
    gradient_accumulation_steps: batches of one optimizer step; the last group of an epoch may have fewer, and steps too
    mixed_precision: "fp32", "bf16" or "fp16" autocast; None takes the adapted model's, and "fp32" without one
    max_steps: optimizer steps in all, in place of num_epochs
    lr_scheduler: a name of transformers' schedules.  warmup_ratio: part of the steps, in [0, 1)
    max_grad_norm: gradients are clipped to it; None leaves them
    weight_decay: AdamW's
    seed: of dropout and of the data order
    eval_steps: optimizer steps between two evaluations; None evaluates after each epoch
    logging_steps: optimizer steps between two log lines.  show_progress: draw a progress bar
    """

    num_epochs: int = 1
    learning_rate: float = 2e-4
    magnitude_learning_rate: float | None = None
    position_learning_rate: float | None = None
    per_device_batch_size: int | None = None
    gradient_accumulation_steps: int = 1
    mixed_precision: str | None = None
    max_steps: int | None = None
    lr_scheduler: str = "linear"
    warmup_ratio: float = 0.0
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    eval_steps: int | None = None
    logging_steps: int = 10
    show_progress: bool = True

    def __post_init__(self) -> None:
        for name in ("num_epochs", "gradient_accumulation_steps", "logging_steps", *_OPTIONAL_COUNTS):
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL_COUNTS:
                setattr(self, name, whole_number(name, value, 1))
        for name in ("learning_rate", *_OPTIONAL_NUMBERS):
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL_NUMBERS:
                setattr(self, name, real_number(name, value, "positive and finite", lambda number: number > 0))
        self.weight_decay = real_number(
            "weight_decay", self.weight_decay, "0 or more and finite", lambda number: number >= 0
        )
        self.warmup_ratio = real_number("warmup_ratio", self.warmup_ratio, "in [0, 1)", lambda number: 0 <= number < 1)
        self.seed = whole_number("seed", self.seed, 0)
        _require(self.seed < 2**32, "seed", "less than 2**32", self.seed)
        _require(
            self.mixed_precision is None or self.mixed_precision in list(_AUTOCAST_DTYPES),
            "mixed_precision",
            f"None or one of {', '.join(_AUTOCAST_DTYPES)}",
            self.mixed_precision,
        )
        _require(
            self.lr_scheduler in _SCHEDULERS, "lr_scheduler", f"one of {', '.join(_SCHEDULERS)}", self.lr_scheduler
        )


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step: its mean loss over `tokens` predicted tokens, before the update."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float


@dataclass
class TrainingResult:
    """What a training run did: every step, and the mean evaluation loss by step."""

    steps: list[StepRecord] = field(default_factory=list)
    eval_losses: dict[int, float] = field(default_factory=dict)


class HyLoRADATrainer:
    """Trains whatever of a model requires a gradient.

    model: an adapted model, or any causal language model with trainable parameters
    train_dataloader, eval_dataloader: batches with input_ids and optionally attention_mask and labels (-100: not
        predicted); the same weight for every predicted token of an optimizer step, however batches divide them
    optimizer: replaces AdamW over the learning rates and the weight decay of the config
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataloader: DataLoader,
        eval_dataloader: DataLoader | None = None,
        config: TrainingConfig | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.model = model
        self.config = config or TrainingConfig()
        self.train_dataloader = train_dataloader
        self.eval_dataloader = eval_dataloader
        self.optimizer = optimizer
        self._check_dataloader()
        self.precision = self.config.mixed_precision or _inherited_precision(model)

    def train(self) -> TrainingResult:
        """Run all steps and return their record; the model is trained in place and left in evaluation mode."""
        config = self.config
        set_seed(config.seed)
        # autocast and the loss scale are set here: accelerate would rewrite the model's forward, and for good
        accelerator = Accelerator(
            mixed_precision="no",
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=config.seed),
        )
        model, optimizer, loader = accelerator.prepare(
            self.model, self.optimizer or self._make_optimizer(), self.train_dataloader
        )
        total_steps, eval_steps = self._plan(loader)
        scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=math.ceil(config.warmup_ratio * total_steps),
            num_training_steps=total_steps,
        )
        scaler = torch.amp.GradScaler(accelerator.device.type, enabled=self.precision == "fp16")

        result = TrainingResult()
        hidden = not (config.show_progress and accelerator.is_local_main_process)
        with tqdm(total=total_steps, desc="training", unit="step", disable=hidden) as bar:
            model.train()
            for step, group in enumerate(self._groups(loader, total_steps), start=1):
                record = self._step(step, group, accelerator, model, optimizer, scaler)
                scheduler.step()
                result.steps.append(record)
                bar.update()
                bar.set_postfix(loss=f"{record.loss:.3f}")
                if step % config.logging_steps == 0:
                    logger.info("step %d of %d: loss %.4f", step, total_steps, record.loss)
                if self.eval_dataloader is not None and (step % eval_steps == 0 or step == total_steps):
                    with self._autocast(accelerator):
                        result.eval_losses[step] = mean_loss(self.model, self.eval_dataloader)
                    logger.info("step %d of %d: evaluation loss %.4f", step, total_steps, result.eval_losses[step])
        self.model.eval()
        return result

    def _step(
        self,
        step: int,
        group: list[dict[str, Tensor]],
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scaler: torch.amp.GradScaler,
    ) -> StepRecord:
        started = time.perf_counter()
        learning_rate = optimizer.param_groups[0]["lr"]
        local_tokens = torch.stack([predicted_tokens(batch) for batch in group]).sum()
        tokens = int(accelerator.reduce(local_tokens, reduction="sum"))
        if tokens == 0:
            raise ValueError(f"step {step} has no token to learn from: every label of its batches is -100")

        losses = []
        for i, batch in enumerate(group):
            is_last = i == len(group) - 1
            with nullcontext() if is_last else accelerator.no_sync(model):
                with self._autocast(accelerator):
                    loss_sum, _ = batch_loss_sum(model, batch)
                # gradients are averaged over processes: the factor makes them the sum
                loss = loss_sum * (accelerator.num_processes / tokens)
                accelerator.backward(scaler.scale(loss))
            losses.append(loss_sum.detach())
        loss_value = float(accelerator.reduce(torch.stack(losses).sum(), reduction="sum")) / tokens
        scaler.unscale_(optimizer)
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        grad_norm = float(accelerator.clip_grad_norm_(_trainable(self.model), limit))
        # an infinite gradient alone is ordinary under a loss scale: the scaler skips the update and lowers the scale
        if not math.isfinite(loss_value) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
            raise RuntimeError(
                f"step {step} has the loss {loss_value} and the gradient norm {grad_norm}; it was not taken. Lower "
                f'the learning rate (now {learning_rate:g}), or train in another precision (now "{self.precision}")'
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return StepRecord(step, loss_value, learning_rate, grad_norm, tokens, time.perf_counter() - started)

    def _groups(self, loader: Any, total_steps: int) -> Iterator[list[dict[str, Tensor]]]:
        """Yield the batches of each optimizer step; an epoch's last group holds what is left."""
        made = 0
        while made < total_steps:
            made_before = made
            batches = iter(loader)
            while made < total_steps:
                group = list(itertools.islice(batches, self.config.gradient_accumulation_steps))
                if not group:
                    break
                made += 1
                yield group
            if made == made_before:
                raise ValueError("train_dataloader yields no batch")

    def _plan(self, loader: Any) -> tuple[int, int]:
        """Return the number of optimizer steps and how many lie between two evaluations."""
        config = self.config
        try:
            epoch_steps = math.ceil(len(loader) / config.gradient_accumulation_steps)
        except TypeError:
            if config.max_steps is None:
                raise ValueError("train_dataloader has no length: say how long to train with max_steps") from None
            epoch_steps = config.max_steps
        if epoch_steps == 0:
            raise ValueError("train_dataloader yields no batch")
        return config.max_steps or config.num_epochs * epoch_steps, config.eval_steps or epoch_steps

    def _autocast(self, accelerator: Accelerator) -> torch.autocast:
        dtype = _AUTOCAST_DTYPES[self.precision]
        return torch.autocast(accelerator.device.type, dtype=dtype, enabled=dtype is not None)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if not _trainable(self.model):
            raise ValueError("the model has no trainable parameter: adapt it with HyLoRADAModel, or unfreeze some")
        if hasattr(self.model, "hylorada_config"):
            groups = get_lora_plus_param_groups(
                model=self.model,
                lr_lora=config.learning_rate,
                lr_magnitude=config.magnitude_learning_rate or config.learning_rate,
                lr_position=config.position_learning_rate or config.learning_rate,
                lr_attention=config.learning_rate,
                lr_landmark=config.learning_rate,
                weight_decay=config.weight_decay,
            )
        elif config.magnitude_learning_rate or config.position_learning_rate:
            raise ValueError(
                "magnitude_learning_rate and position_learning_rate are for models adapted by HyLoRADAModel"
            )
        else:
            groups = [{"params": _trainable(self.model), "weight_decay": config.weight_decay}]
        return torch.optim.AdamW(groups, lr=config.learning_rate)

    def _check_dataloader(self) -> None:
        expected, given = self.config.per_device_batch_size, getattr(self.train_dataloader, "batch_size", None)
        if expected is not None and given is not None and expected != given:
            raise ValueError(
                f"per_device_batch_size is {expected}, but train_dataloader makes batches of {given}: make them equal, "
                "or leave per_device_batch_size out"
            )


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _inherited_precision(model: nn.Module) -> str:
    config = getattr(model, "hylorada_config", None)
    return config.mixed_precision if config is not None else "fp32"


def _require(holds: bool, name: str, allowed: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
