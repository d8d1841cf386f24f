"""What a training run carries from step to step: taken and given back so that it goes on bit for bit."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .even_batches import unlearned
from .storage import check_base, fingerprint


class Batches:
    """The batches of each optimizer step, epoch after epoch, from any position on.

    loader: what accelerate made of a dataloader.   group_size: batches of a step; an epoch's last group holds the rest
    last_rows: how many rows of an epoch's last batch count; None: all
    """

    def __init__(self, loader: Any, group_size: int, device: torch.device, last_rows: int | None = None) -> None:
        self.loader = loader
        self.last_rows = last_rows
        self.group_size = group_size
        self.device = device
        self.epoch = 0
        # batches of this epoch that are in groups already
        self.taken = 0
        self._epoch_random: dict[str, Any] = {}
        self._resumed_random: dict[str, Any] | None = None

    def random_state(self) -> dict[str, Any]:
        """The random numbers of this process: now, and when the epoch began."""
        return {"now": random_state(self.device), "epoch": self._epoch_random}

    def resume(self, epoch: int, taken: int, random_states: dict[str, Any]) -> None:
        """Go on at a position; the random numbers follow when its batches are there."""
        self.epoch, self.taken = epoch, taken
        self._epoch_random, self._resumed_random = random_states["epoch"], random_states["now"]

    def __iter__(self) -> Iterator[list[dict[str, Tensor]]]:
        while True:
            # samplers and workers take their seeds where an epoch begins
            if self._resumed_random is None:
                self._epoch_random = random_state(self.device)
            else:
                set_random_state(self._epoch_random, self.device)
            batches = self._counting(self._rest_of_epoch())
            group = list(itertools.islice(batches, self.group_size))
            if self._resumed_random is not None:
                # fetching a batch draws random numbers too
                set_random_state(self._resumed_random, self.device)
                self._resumed_random = None
            while group:
                self.taken += len(group)
                yield group
                group = list(itertools.islice(batches, self.group_size))
            if not self.taken:
                raise ValueError("train_dataloader yields no batch")
            self.epoch, self.taken = self.epoch + 1, 0

    def _counting(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        if self.last_rows is None:
            yield from batches
            return
        last = len(self.loader) - 1
        for i, batch in enumerate(batches, start=self.taken):
            yield unlearned(batch, self.last_rows) if i == last else batch

    def _rest_of_epoch(self) -> Iterator[dict[str, Tensor]]:
        if not isinstance(self.loader, DataLoader):
            return itertools.islice(self.loader, self.taken, None)
        self.loader.set_epoch(self.epoch)  # type: ignore[attr-defined]
        return iter(skip_first_batches(self.loader, self.taken) if self.taken else self.loader)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's random numbers, and of the device's."""
    version, numbers, python_gauss = random.getstate()
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": (version, torch.tensor(numbers), python_gauss),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """The inverse of random_state."""
    version, numbers, python_gauss = state["python"]
    random.setstate((version, tuple(numbers.tolist()), python_gauss))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"])


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only (FSDP2's DTensor)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every process takes part where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def gathered(tree: Any, accelerator: Accelerator) -> Any:
    """A tree with its tensors whole and on the CPU; every process takes part, and all but the main one get None."""

    def take(tensor: Tensor) -> Tensor | None:
        complete = whole(tensor.detach())
        return complete.cpu() if accelerator.is_main_process else None

    return _mapped(tree, take)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def fill(parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]) -> None:
    """Give parameters their saved values, sharded as they are."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(saved[name].to(parameter.device), parameter))


def fill_optimizer(optimizer: Any, saved: dict[str, Any]) -> None:
    """Give an optimizer its saved state, sharded as its parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {
        index: {
            name: _like(value.to(parameters[index].device), parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What tells a model from another one: its config, what of it is trained, and what its frozen weights are."""
    return {"config": _config(model), "trainable": _shapes(model), "frozen": fingerprint(_frozen(model))}


def check_model(saved: dict[str, Any], model: nn.Module) -> None:
    """ValueError where a model is not the one that `describe_model` saw."""
    check_same(saved["config"], _config(model), "the config of the model")
    check_same(saved["trainable"], _shapes(model), "what is trained of the model")
    check_base(saved["frozen"], _frozen(model), "resume with the base model that the checkpoint was made with")


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], what: str) -> None:
    """ValueError that names the first difference between two records, as JSON has them."""
    saved, now = (json.loads(json.dumps(record, default=str)) for record in (saved, now))
    for name in [*saved, *(name for name in now if name not in saved)]:
        before, after = saved.get(name), now.get(name)
        if before != after:
            raise ValueError(f"{what}: {name} is {after!r}, and the checkpoint has {before!r}")


def _config(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "hylorada_config", None)
    return {} if config is None else config.to_dict()


def _shapes(model: nn.Module) -> dict[str, list]:
    return {name: [list(value.shape), str(value.dtype)] for name, value in trainable(model).items()}


def _frozen(model: nn.Module) -> dict[str, Tensor]:
    # of weights that are sharded only names and shapes are compared: on "meta" they have no values
    return {
        name: torch.empty_like(value, device="meta") if is_sharded(value) else value
        for name, value in model.named_parameters()
        if not value.requires_grad
    }


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]


def _mapped(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(item, function) for item in tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, function) for key, value in tree.items()}
    return tree
