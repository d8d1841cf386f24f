"""Checkpoint folders of a training run: safetensors and JSON, written as a whole or not at all.

A folder `checkpoint-<step>` takes its name when all of it is on the disk, and loses it before any of it goes away.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .files import record_checksum, sha256_of, sync

FORMAT_VERSION = 1
TENSORS_FILE = "training.safetensors"
STATE_FILE = "training.json"

_NAME = re.compile(r"checkpoint-(\d+)")
_SCRATCH = (".saving-", ".removing-")
# JSON knows neither tensors nor tuples, and no keys but strings
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"
_TAKE_ANOTHER = "resume from another checkpoint"


def save_checkpoint(output_dir: str | os.PathLike, step: int, state: dict[str, Any], keep: int | None = None) -> Path:
    """Write the checkpoint of a step, then remove all but the last `keep`. -> its folder.

    state: a tree of dicts, lists, tuples, numbers, strings, None and tensors
    A process that dies on the way leaves the earlier checkpoints as they were.
    """
    output_dir = Path(output_dir)
    checkpoint, scratch = output_dir / f"checkpoint-{step}", output_dir / f"{_SCRATCH[0]}{step}"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output_dir)
        scratch.mkdir()
        _write(scratch, state)
        for path in (scratch / TENSORS_FILE, scratch / STATE_FILE, scratch):
            sync(path)
        os.rename(scratch, checkpoint)
        sync(output_dir)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"cannot save {checkpoint}: {error}; earlier checkpoints are unchanged") from error
        raise
    if keep is not None:
        _remove(output_dir, checkpoints(output_dir)[:-keep])
    return checkpoint


def load_checkpoint(directory: str | os.PathLike) -> dict[str, Any]:
    """Return the state that `save_checkpoint` was given, its tensors on the CPU, and check every byte of it.

    Raises:
        FileNotFoundError: there is no checkpoint.   ValueError: it is damaged, foreign or of a newer format.
    """
    directory = Path(directory)
    state_path, tensors_path = directory / STATE_FILE, directory / TENSORS_FILE
    for path in (state_path, tensors_path):
        if not path.is_file():
            raise FileNotFoundError(f"{directory} is no checkpoint of a training run: there is no {path.name} in it")
    try:
        record = json.loads(state_path.read_text(encoding="utf-8"))
        version = record["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{state_path} is damaged: {error!r}; {_TAKE_ANOTHER}") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise ValueError(
            f"{state_path} has format version {version!r}, this hylorada reads up to {FORMAT_VERSION}; "
            "install a newer hylorada"
        )
    if record.pop("checksum", None) != record_checksum(record):
        raise ValueError(f"{state_path} is damaged or was edited: its checksum does not fit; {_TAKE_ANOTHER}")
    if sha256_of(tensors_path) != record["tensors_sha256"]:
        raise ValueError(f"{tensors_path} is damaged: its checksum does not fit; {_TAKE_ANOTHER}")
    return _unpack(record["state"], load_file(tensors_path))


def checkpoints(output_dir: str | os.PathLike) -> list[Path]:
    """Return the checkpoint folders of a run, the earliest step first."""
    output_dir = Path(output_dir)
    folders = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(folders, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the optimizer step in the name of a checkpoint's folder."""
    return int(checkpoint.name.rpartition("-")[2])


def _write(folder: Path, state: dict[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    packed = _pack(state, "", tensors)
    save_file(_apart(tensors), folder / TENSORS_FILE, {"format": "pt"})
    record = {
        "format_version": FORMAT_VERSION,
        "state": packed,
        "tensors_sha256": sha256_of(folder / TENSORS_FILE),
    }
    record["checksum"] = record_checksum(record)
    (folder / STATE_FILE).write_text(json.dumps(record) + "\n", encoding="utf-8")


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON for a tree; its tensors go into `tensors` by their path in it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {_TENSOR: path}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, dict):
        pairs = [(key, _pack(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("__") for key in value)
        return dict(pairs) if plain else {_ITEMS: [[_pack(key, path, tensors), item] for key, item in pairs]}
    raise TypeError(
        f"a checkpoint holds numbers, strings, tensors, and lists, tuples and dicts of them; {path} is a "
        f"{type(value).__name__}: train with an optimizer whose state is made of those, or without output_dir"
    )


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpack(value[_TUPLE], tensors))
    if _ITEMS in value:
        return {_unpack(key, tensors): _unpack(item, tensors) for key, item in value[_ITEMS]}
    return {key: _unpack(item, tensors) for key, item in value.items()}


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy what shares memory with an earlier tensor: safetensors refuses it."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return apart


def _remove(output_dir: Path, folders: list[Path]) -> None:
    for folder in folders:
        os.rename(folder, output_dir / f"{_SCRATCH[1]}{folder.name}")
    sync(output_dir)
    _remove_leftovers(output_dir)


def _remove_leftovers(output_dir: Path) -> None:
    """Remove what a process that died had begun to write or to remove."""
    for path in output_dir.iterdir():
        if path.name.startswith(_SCRATCH) and path.is_dir():
            shutil.rmtree(path)
