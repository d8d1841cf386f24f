"""The training loop: token-weighted loss, gradient accumulation, mixed precision, on any number of processes."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, gather_object, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import SchedulerType, get_scheduler

from .checkpoint import checkpoints, load_checkpoint, save_checkpoint
from .config import real_number, whole_number
from .evaluation import batch_loss_sum, mean_loss, predicted_tokens
from .even_batches import evened, own_rows
from .model import get_lora_plus_param_groups
from .pretrained import DTYPES
from .run_state import (
    Batches,
    check_model,
    check_same,
    describe_model,
    fill,
    fill_optimizer,
    gathered,
    is_sharded,
    trainable,
    whole,
)
from .trackers import FILE_TRACKERS, TRACKERS, JsonLines, require_tracker

logger = logging.getLogger(__name__)

# they need arguments that the config does not have
_UNSUPPORTED_SCHEDULERS = {
    "cosine_warmup_with_min_lr",
    "cosine_with_min_lr",
    "greedy",
    "reduce_lr_on_plateau",
    "warmup_stable_decay",
}
_SCHEDULERS = sorted({kind.value for kind in SchedulerType} - _UNSUPPORTED_SCHEDULERS)
_OPTIONAL_COUNTS = (
    "per_device_batch_size",
    "max_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "early_stopping_patience",
)
_OPTIONAL_NUMBERS = ("magnitude_learning_rate", "position_learning_rate", "max_grad_norm")
# a run that is resumed must have these as they were; the number of steps too, however it is given
_DECISIVE = (
    "learning_rate",
    "magnitude_learning_rate",
    "position_learning_rate",
    "gradient_accumulation_steps",
    "lr_scheduler",
    "warmup_ratio",
    "max_grad_norm",
    "weight_decay",
    "seed",
)


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
    early_stopping_patience: stop after so many evaluations in a row whose loss is not lower than the best one by more
        than early_stopping_threshold; None never stops early
    output_dir: where checkpoints and logs go; None saves nothing.  With it, SIGTERM ends a run after its current step
    save_steps: optimizer steps between two checkpoints; None saves one when the run ends, however it ends
    save_total_limit: checkpoints to keep, the last ones; None keeps all
    resume: None or False starts anew; "latest" or True goes on from the last checkpoint in output_dir, "auto" too where
        there is one; a path, from that checkpoint.  A run that has ended is put back as it ended
    tracker: "none", "jsonl" (output_dir/log.jsonl), "tensorboard" (in output_dir), "wandb" or "trackio"
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
    early_stopping_patience: int | None = None
    early_stopping_threshold: float = 0.0
    output_dir: str | os.PathLike | None = None
    save_steps: int | None = None
    save_total_limit: int | None = None
    resume: bool | str | os.PathLike | None = None
    tracker: str = "none"
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
        for name in ("weight_decay", "early_stopping_threshold"):
            value = real_number(name, getattr(self, name), "0 or more and finite", lambda number: number >= 0)
            setattr(self, name, value)
        self.warmup_ratio = real_number("warmup_ratio", self.warmup_ratio, "in [0, 1)", lambda number: 0 <= number < 1)
        self.seed = whole_number("seed", self.seed, 0)
        _require(self.seed < 2**32, "seed", "less than 2**32", self.seed)
        _require(
            self.mixed_precision is None or self.mixed_precision in list(DTYPES),
            "mixed_precision",
            f"None or one of {', '.join(DTYPES)}",
            self.mixed_precision,
        )
        _require(
            self.lr_scheduler in _SCHEDULERS, "lr_scheduler", f"one of {', '.join(_SCHEDULERS)}", self.lr_scheduler
        )
        if self.lr_scheduler == "constant" and self.warmup_ratio:
            raise ValueError(
                f'warmup_ratio={self.warmup_ratio}: lr_scheduler="constant" has no warm-up; use '
                '"constant_with_warmup", or warmup_ratio=0'
            )
        _require(self.tracker in TRACKERS, "tracker", f"one of {', '.join(TRACKERS)}", self.tracker)
        self._check_output()

    def _check_output(self) -> None:
        if not isinstance(self.output_dir, (str, os.PathLike, type(None))):
            raise TypeError(f"output_dir must be a path or None, got {self.output_dir!r}")
        if not isinstance(self.resume, (bool, str, os.PathLike, type(None))):
            raise TypeError(f'resume must be a path, "latest", "auto", True, False or None, got {self.resume!r}')
        if self.output_dir is None:
            needing = [name for name in ("save_steps", "save_total_limit") if getattr(self, name) is not None]
            if self.resume in (True, "latest", "auto"):
                needing.append("resume")
            if self.tracker in FILE_TRACKERS:
                needing.append("tracker")
            if needing:
                raise ValueError(f"{needing[0]}={getattr(self, needing[0])!r} needs output_dir, the folder of the run")
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                f"early_stopping_threshold={self.early_stopping_threshold} does nothing without early_stopping_patience"
            )


class DivergedError(RuntimeError):
    """A step whose loss or gradient is not finite; it was not taken."""


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
    """What a training run did, what came before it was resumed included.

    steps: every optimizer step.   eval_losses: the mean evaluation loss by step
    ending: "completed"; "stopped early", by early_stopping_patience; or "terminated", by SIGTERM
    checkpoint: the last one, None without output_dir
    """

    steps: list[StepRecord] = field(default_factory=list)
    eval_losses: dict[int, float] = field(default_factory=dict)
    ending: str = "completed"
    checkpoint: Path | None = None


@dataclass
class _Run:
    """The parts of one call of `train`. facts: what it must share with a checkpoint that it is resumed from."""

    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    scaler: torch.amp.GradScaler
    batches: Batches
    total_steps: int
    eval_steps: int
    facts: dict[str, Any]
    result: TrainingResult


class HyLoRADATrainer:
    """Trains whatever of a model requires a gradient.

    model: an adapted model, or any causal language model with trainable parameters; one that `fully_shard` (FSDP2) has
        divided among the processes already stays as it is, any other one is copied to each of them (DDP)
    train_dataloader, eval_dataloader: batches with input_ids and optionally attention_mask and labels (-100: not
        predicted); the same weight for every predicted token of an optimizer step, however batches divide them
    optimizer: replaces AdamW over the learning rates and the weight decay of the config

    A run that is resumed repeats an uninterrupted one bit for bit, on the same machine and number of processes, unless
    the dataset itself draws random numbers when a row is read.
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
        self._check_dataloaders()
        require_tracker(self.config.tracker)
        self.precision = self.config.mixed_precision or _inherited_precision(model)

    def train(self) -> TrainingResult:
        """Run all steps and return their record; the model is trained in place and left in evaluation mode.

        SIGTERM, where there is an output_dir and this is the main thread: the current step is finished, a checkpoint
        saved, and the result says "terminated".
        """
        config = self.config
        run = self._start()
        result = run.result
        ending = self._ending(run, terminated=False) if result.steps else None
        if ending:
            logger.info("the run has ended already, at step %d of %d", len(result.steps), run.total_steps)
            result.ending = ending
            self.model.eval()
            return result
        hidden = not (config.show_progress and run.accelerator.is_local_main_process)
        with (
            tqdm(total=run.total_steps, initial=len(result.steps), desc="training", unit="step", disable=hidden) as bar,
            self._tracking(run.accelerator, result),
            _sigterm_deferred(config.output_dir is not None) as terminated,
        ):
            run.model.train()
            for group in run.batches:
                record = self._step(run, group)
                bar.update()
                bar.set_postfix(loss=f"{record.loss:.3f}")
                if self.eval_dataloader is not None and (
                    record.step % run.eval_steps == 0 or record.step == run.total_steps
                ):
                    self._evaluate(run, record.step)
                ending = self._ending(run, terminated())
                if config.output_dir is not None and (ending or record.step % (config.save_steps or math.inf) == 0):
                    self._save(run)
                if ending:
                    result.ending = ending
                    break
        if result.ending != "completed":
            logger.warning("training %s after step %d of %d", result.ending, len(result.steps), run.total_steps)
        self.model.eval()
        return result

    def _start(self) -> _Run:
        """Put the parts together, in the state of the checkpoint where the run is resumed."""
        config = self.config
        checkpoint = self._find_checkpoint()
        saved = None if checkpoint is None else load_checkpoint(checkpoint)
        set_seed(config.seed)
        # autocast and the loss scale are set here: accelerate would rewrite the model's forward, and for good
        accelerator = Accelerator(
            mixed_precision="no",
            # every process reads a stream itself: batches that one process hands out must be of one length
            dataloader_config=DataLoaderConfiguration(
                dispatch_batches=False, use_seedable_sampler=True, data_seed=config.seed
            ),
            log_with=self._tracker(),
            project_dir=config.output_dir,
        )
        model, optimizer, loader = self._prepare(accelerator)
        total_steps, eval_steps = self._plan(loader)
        facts = self._facts(accelerator, optimizer, loader, total_steps)
        if saved is not None:
            self._check_fits(saved, facts, f"cannot resume from {checkpoint}")
        scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=math.ceil(config.warmup_ratio * total_steps),
            num_training_steps=total_steps,
        )
        scaler = torch.amp.GradScaler(accelerator.device.type, enabled=self.precision == "fp16")
        last_rows = own_rows(self.train_dataloader, accelerator.num_processes, accelerator.process_index)
        batches = Batches(loader, config.gradient_accumulation_steps, accelerator.device, last_rows)
        result = TrainingResult(checkpoint=checkpoint)
        run = _Run(accelerator, model, optimizer, scheduler, scaler, batches, total_steps, eval_steps, facts, result)
        if saved is not None:
            self._restore(run, saved)
        return run

    def _prepare(self, accelerator: Accelerator) -> tuple[nn.Module, Any, Any]:
        optimizer = self.optimizer or self._make_optimizer()
        loader = evened(self.train_dataloader, accelerator.num_processes)
        if any(map(is_sharded, self.model.parameters())):
            return self.model, *accelerator.prepare(optimizer, loader)
        return accelerator.prepare(self.model, optimizer, loader)

    def _step(self, run: _Run, group: list[dict[str, Tensor]]) -> StepRecord:
        accelerator, model, optimizer, scaler = run.accelerator, run.model, run.optimizer, run.scaler
        step = len(run.result.steps) + 1
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
        grad_norm = float(whole(accelerator.clip_grad_norm_(trainable(self.model).values(), limit)))
        # an infinite gradient alone is ordinary under a loss scale: the scaler skips the update and lowers the scale
        if not math.isfinite(loss_value) or not (math.isfinite(grad_norm) or scaler.is_enabled()):
            raise DivergedError(
                f"step {step} has the loss {loss_value} and the gradient norm {grad_norm}; it was not taken. Lower "
                f'the learning rate (now {learning_rate:g}), or train in another precision (now "{self.precision}")'
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.scheduler.step()
        record = StepRecord(step, loss_value, learning_rate, grad_norm, tokens, time.perf_counter() - started)
        run.result.steps.append(record)
        _track(accelerator, record)
        if step % self.config.logging_steps == 0:
            logger.info("step %d of %d: loss %.4f", step, run.total_steps, loss_value)
        return record

    def _evaluate(self, run: _Run, step: int) -> None:
        with self._autocast(run.accelerator):
            loss = mean_loss(self.model, self.eval_dataloader)  # type: ignore[arg-type]
        run.result.eval_losses[step] = loss
        run.accelerator.log({"eval_loss": loss}, step=step)
        logger.info("step %d of %d: evaluation loss %.4f", step, run.total_steps, loss)

    def _ending(self, run: _Run, terminated: bool) -> str | None:
        """How the run ends after this step, None where it goes on."""
        if len(run.result.steps) == run.total_steps:
            return "completed"
        if self._has_stalled(run.result.eval_losses):
            return "stopped early"
        return "terminated" if _in_any_process(terminated, run.accelerator) else None

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

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to resume from, None for a run that starts anew."""
        resume, output_dir = self.config.resume, self.config.output_dir
        present = [] if output_dir is None else checkpoints(output_dir)
        if resume is None or resume is False or (resume == "auto" and not present):
            if present:
                raise ValueError(
                    f'{output_dir} holds {present[-1].name} of an earlier run: go on from it with resume="latest", '
                    "or take another output_dir"
                )
            return None
        if resume in (True, "latest", "auto"):
            if not present:
                raise FileNotFoundError(
                    f'{output_dir} holds no checkpoint to resume from; resume="auto" starts anew where there is none'
                )
            return present[-1]
        checkpoint = Path(resume)  # type: ignore[arg-type]
        if present and checkpoint.resolve() != present[-1].resolve():
            raise ValueError(
                f"{output_dir} holds {present[-1].name}, and the run would go on from {checkpoint}: delete what is "
                "later, or take another output_dir"
            )
        return checkpoint

    def _facts(self, accelerator: Accelerator, optimizer: Any, loader: Any, total_steps: int) -> dict[str, Any]:
        """What a run must share with the checkpoint that it is resumed from."""
        if self.config.output_dir is None and self.config.resume in (None, False):
            return {}
        training = {name: getattr(self.config, name) for name in _DECISIVE}
        groups = {
            f"{name} of parameter group {i}": len(value) if name == "params" else value
            for i, group in enumerate(optimizer.param_groups)
            for name, value in group.items()
        }
        dataset = getattr(self.train_dataloader, "dataset", None)
        return {
            "run": training
            | {
                "precision": self.precision,
                "optimizer steps in all": total_steps,
                "processes": accelerator.num_processes,
                "batch size": getattr(self.train_dataloader, "batch_size", None),
                "batches of an epoch": _length(loader),
                "rows of the data": _length(dataset),
                "optimizer": type(optimizer.optimizer).__name__,
            }
            | groups,
            "model": describe_model(self.model),
        }

    def _check_fits(self, saved: dict[str, Any], facts: dict[str, Any], failure: str) -> None:
        try:
            check_same(saved["run"], facts["run"], "this run")
            check_model(saved["model"], self.model)
        except ValueError as error:
            raise ValueError(f"{failure}: {error}") from error

    def _save(self, run: _Run) -> None:
        """Write a checkpoint; every process takes part."""
        output_dir = Path(self.config.output_dir)  # type: ignore[arg-type]
        result, accelerator = run.result, run.accelerator
        state = run.facts | {
            "steps": [astuple(record) for record in result.steps],
            "eval_losses": list(result.eval_losses.items()),
            "position": {"epoch": run.batches.epoch, "batches": run.batches.taken},
            "parameters": gathered(trainable(self.model), accelerator),
            "optimizer": gathered(run.optimizer.state_dict(), accelerator),
            "scheduler": run.scheduler.state_dict(),
            "scaler": run.scaler.state_dict(),
            "random": gather_object([run.batches.random_state()]),
        }
        step = len(result.steps)
        if accelerator.is_main_process:
            save_checkpoint(output_dir, step, state, self.config.save_total_limit)
        # no process ends, or trains on, before the checkpoint is there
        accelerator.wait_for_everyone()
        result.checkpoint = output_dir / f"checkpoint-{step}"

    def _restore(self, run: _Run, saved: dict[str, Any]) -> None:
        fill(trainable(self.model), saved["parameters"])
        fill_optimizer(run.optimizer, saved["optimizer"])
        run.scheduler.load_state_dict(saved["scheduler"])
        if run.scaler.is_enabled():
            run.scaler.load_state_dict(saved["scaler"])
        run.result.steps = [StepRecord(*values) for values in saved["steps"]]
        run.result.eval_losses = dict(saved["eval_losses"])
        position = saved["position"]
        random_states = saved["random"][run.accelerator.process_index]
        run.batches.resume(position["epoch"], position["batches"], random_states)

    def _has_stalled(self, eval_losses: dict[int, float]) -> bool:
        """Whether the last early_stopping_patience evaluations brought nothing."""
        patience = self.config.early_stopping_patience
        best, since_best = math.inf, 0
        for loss in eval_losses.values():
            improves = loss < best - self.config.early_stopping_threshold
            best, since_best = (loss, 0) if improves else (best, since_best + 1)
        return patience is not None and since_best >= patience

    def _tracker(self) -> str | JsonLines | None:
        config = self.config
        if config.tracker == "jsonl":
            return JsonLines(config.output_dir)  # type: ignore[arg-type]
        return None if config.tracker == "none" else config.tracker

    @contextmanager
    def _tracking(self, accelerator: Accelerator, result: TrainingResult) -> Iterator[None]:
        if self.config.tracker == "none":
            yield
            return
        options = {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in asdict(self.config).items()
        }
        # what an interrupted run has written beyond its last checkpoint comes again
        arguments = {"tensorboard": {"purge_step": len(result.steps) + 1}}
        accelerator.init_trackers("hylorada", options, arguments)
        if self.config.tracker == "jsonl":
            for record in result.steps:
                _track(accelerator, record)
                if record.step in result.eval_losses:
                    accelerator.log({"eval_loss": result.eval_losses[record.step]}, step=record.step)
        try:
            yield
        finally:
            for tracker in accelerator.trackers:
                tracker.finish()

    def _autocast(self, accelerator: Accelerator) -> torch.autocast:
        return torch.autocast(accelerator.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32")

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        parameters = list(trainable(self.model).values())
        if not parameters:
            raise ValueError("the model has no trainable parameter: adapt it with HyLoRADAModel, or unfreeze some")
        if hasattr(self.model, "hylorada_config"):
            self._check_rates()
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
            groups = [{"params": parameters, "weight_decay": config.weight_decay}]
        return torch.optim.AdamW(groups, lr=config.learning_rate)

    def _check_rates(self) -> None:
        counts = self.model.count_params()  # type: ignore[operator]
        for name, kinds in (
            ("magnitude_learning_rate", ("magnitude", "residual_weight")),
            ("position_learning_rate", ("position_bias",)),
        ):
            if getattr(self.config, name) is not None and not any(counts[kind] for kind in kinds):
                raise ValueError(
                    f"{name}={getattr(self.config, name)}, but the model trains no {' or '.join(kinds)}; leave it out"
                )

    def _check_dataloaders(self) -> None:
        expected, given = self.config.per_device_batch_size, getattr(self.train_dataloader, "batch_size", None)
        if expected is not None and given is not None and expected != given:
            raise ValueError(
                f"per_device_batch_size is {expected}, but train_dataloader makes batches of {given}: make them equal, "
                "or leave per_device_batch_size out"
            )
        for name in ("early_stopping_patience", "eval_steps"):
            if getattr(self.config, name) is not None and self.eval_dataloader is None:
                raise ValueError(f"{name}={getattr(self.config, name)} needs an eval_dataloader")


@contextmanager
def _sigterm_deferred(wanted: bool) -> Iterator[Callable[[], bool]]:
    """Yield whether SIGTERM has come, in place of what it did before; only the main thread can."""
    received: list[int] = []
    previous = signal.getsignal(signal.SIGTERM)
    # None: a handler that Python cannot put back
    if not wanted or previous is None or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _in_any_process(happened: bool, accelerator: Accelerator) -> bool:
    if accelerator.num_processes == 1:
        return happened
    return bool(accelerator.reduce(torch.tensor(float(happened), device=accelerator.device), reduction="sum"))


def _track(accelerator: Accelerator, record: StepRecord) -> None:
    values = asdict(record)
    accelerator.log(values, step=values.pop("step"))


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:
        return None


def _inherited_precision(model: nn.Module) -> str:
    config = getattr(model, "hylorada_config", None)
    return config.mixed_precision if config is not None else "fp32"


def _require(holds: bool, name: str, allowed: str, value: Any) -> None:
    if not holds:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
