"""Adapter files: safetensors beside a JSON record with the config, the base model's fingerprint and a checksum.

A folder is written as a whole: all files go into a scratch folder, and replace the old ones when all are on the disk.
From then on a mark in the scratch folder says so: where the process is killed between two of the replacements, whoever
reads or writes the folder next finishes them. A lock keeps two processes from writing one folder at a time.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .files import record_checksum, sha256_of, sync

try:
    import fcntl
except ImportError:  # Windows: saves into one folder must not overlap there
    fcntl = None  # type: ignore[assignment]

FORMAT_VERSION = 1
TENSORS_FILE = "adapter.safetensors"
RECORD_FILE = "hylorada_config.json"
# in a scratch folder: all new files are whole; the names of those that then go away
SCRATCH_PREFIX, MARK_FILE = ".saving-", "obsolete.json"

# a new full model with other shards would not overwrite these, and transformers would load them
FULL_MODEL_FILES = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
FULL_MODEL_CONFIGS = ("config.json", "generation_config.json")

_LOAD_THE_RIGHT_ONE = (
    "load the base model that the adapter was trained on, or pass strict_base=False if you know that it fits"
)

SAMPLED_TENSORS = 32
SAMPLED_ROWS = 8
ROW_NORM_TOLERANCE = 0.02


@dataclass(frozen=True)
class SavedAdapter:
    """What an adapter's folder holds.

    config: of HyLoRADAConfig.to_dict.   base_model: its name or path, or "".   base_fingerprint: of `fingerprint`.
    merged: the folder holds a full model too, and the tensors are what acts beside it at run time.
    tensors: the adapter's, by name.
    """

    config: dict[str, Any]
    merged: bool
    base_model: str
    base_fingerprint: dict[str, Any]
    tensors: Mapping[str, Tensor]


@contextmanager
def replacing_files(directory: str | os.PathLike, obsolete: tuple[str, ...] = ()) -> Iterator[Path]:
    """A scratch folder whose files move into `directory` when the block succeeds; else `directory` stays as it was.

    obsolete: patterns of files that then go away, unless there are new ones of their names.
    """
    directory = Path(directory)
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory, shared=False):
            _finish(directory)
            for stale in directory.glob(f"{SCRATCH_PREFIX}*"):
                shutil.rmtree(stale)
            with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=directory) as scratch:
                new, old = Path(scratch, "new"), Path(scratch, "old")
                new.mkdir()
                old.mkdir()
                yield new
                for path in new.rglob("*"):
                    if path.is_file():
                        sync(path)
                _exchange(directory, new, old, obsolete)
    except BaseException as error:
        if is_new and directory.is_dir() and not any(directory.iterdir()):
            directory.rmdir()
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"cannot save to {directory}: {error}; what was there before is unchanged") from error
        raise


def write_adapter(directory: Path, adapter: SavedAdapter) -> None:
    """Write the two files of an adapter into a folder (a scratch folder of `replacing_files`)."""
    data = save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors.items()}, {"format": "pt"}
    )
    (directory / TENSORS_FILE).write_bytes(data)
    record = {
        "format_version": FORMAT_VERSION,
        "config": adapter.config,
        "merged": adapter.merged,
        "base_model": adapter.base_model,
        "base_fingerprint": adapter.base_fingerprint,
        "tensors_sha256": hashlib.sha256(data).hexdigest(),
    }
    if adapter.merged:
        record["full_model_sha256"] = {path.name: sha256_of(path) for path in _full_model_files(directory)}
    record["checksum"] = record_checksum(record)
    (directory / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_adapter(directory: str | os.PathLike) -> SavedAdapter:
    """Read what `write_adapter` wrote, and check every byte of it.

    Raises:
        FileNotFoundError: there is no adapter.   ValueError: it is damaged, foreign or of a newer format.
    """
    directory = Path(directory)
    finish_interrupted_save(directory)
    try:
        return _read_adapter(directory)
    except ValueError:
        # another process may have been replacing the files meanwhile
        with _locked(directory, shared=True):
            return _read_adapter(directory)


def _read_adapter(directory: Path) -> SavedAdapter:
    record = _read_record(directory)
    path = directory / TENSORS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{directory} has a {RECORD_FILE} but no {TENSORS_FILE}; copy the whole folder again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record["tensors_sha256"]:
        raise ValueError(
            f"{path} is damaged or belongs to another {RECORD_FILE} ({len(data)} bytes); save or copy the adapter again"
        )
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return SavedAdapter(record["config"], record["merged"], record["base_model"], record["base_fingerprint"], tensors)


def check_full_model(directory: str | os.PathLike) -> None:
    """ValueError where a weight file of a merged model is not the one that was saved with the adapter's record."""
    directory = Path(directory)
    # records of the first releases do not tell
    for name, digest in _read_record(directory).get("full_model_sha256", {}).items():
        path = directory / Path(name).name
        if not path.is_file() or sha256_of(path) != digest:
            raise ValueError(
                f"the merged model in {directory} is damaged: {path.name} is not what was saved; save or copy it again"
            )


def holds_merged_model(directory: str | os.PathLike) -> bool:
    """Whether the folder's record says that a full model, the merged one, lies beside it."""
    try:
        finish_interrupted_save(directory)
        return _read_record(Path(directory))["merged"] is True
    except (OSError, ValueError, KeyError):
        return False


def finish_interrupted_save(directory: str | os.PathLike) -> None:
    """Put the files in place that a killed process had written, all of them, but not all in place."""
    directory = Path(directory)
    if any(directory.glob(f"{SCRATCH_PREFIX}*/{MARK_FILE}")):
        with _locked(directory, shared=False):
            _finish(directory)


def fingerprint(parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """What tells one base model from another: all names and shapes, and some norms of rows of some matrices."""
    matrices = [
        name
        for name, tensor in parameters.items()
        if tensor.dim() > 1 and tensor.numel() and tensor.is_floating_point() and not tensor.is_meta
    ]
    return {
        "shapes": {name: list(tensor.shape) for name, tensor in parameters.items()},
        "row_norms": {name: _sampled_row_norms(parameters[name]) for name in _spread(matrices, SAMPLED_TENSORS)},
    }


def check_base(saved: dict[str, Any], parameters: Mapping[str, Tensor], advice: str = _LOAD_THE_RIGHT_ONE) -> None:
    """ValueError, which ends in `advice`, where `parameters` are not those of the base with the `saved` fingerprint."""
    advice = f"; {advice}"
    shapes = {name: list(tensor.shape) for name, tensor in parameters.items()}
    if absent := sorted(saved["shapes"].keys() - shapes.keys()):
        raise ValueError(f"wrong base model: it has no {_some(absent)}{advice}")
    if added := sorted(shapes.keys() - saved["shapes"].keys()):
        raise ValueError(f"wrong base model: the adapter's has no {_some(added)}{advice}")
    for name, shape in saved["shapes"].items():
        if shapes[name] != shape:
            raise ValueError(
                f"wrong base model: {name} has shape {tuple(shapes[name])}, the adapter's has {tuple(shape)}{advice}"
            )
    for name, norms in saved["row_norms"].items():
        if not norms or parameters[name].is_meta:
            continue
        expected, found = torch.tensor(norms), torch.tensor(_sampled_row_norms(parameters[name]))
        difference = ((found - expected).abs() / expected.abs().clamp(min=1e-12)).max().item()
        # written so that a nan fails too
        if not difference <= ROW_NORM_TOLERANCE:
            raise ValueError(
                f"wrong base model: the rows of {name} have norms that differ by {difference:.1%} "
                f"from the adapter's base model ({ROW_NORM_TOLERANCE:.0%} is allowed){advice}"
            )


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """ValueError where an adapter's tensors have not the names and shapes of `expected`, or are not floating point."""
    if absent := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"the adapter does not fit its config on this model: it lacks {_some(absent)}")
    if added := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"the adapter does not fit its config on this model: nothing takes {_some(added)}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise ValueError(
                f"the adapter does not fit its config on this model: {name} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {tuple(expected[name].shape)} floating point"
            )


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD_FILE
    if not path.is_file():
        hint = "; it holds a PEFT adapter, load that with peft" if (directory / "adapter_config.json").is_file() else ""
        raise FileNotFoundError(f"{directory} holds no HyLoRADA adapter: there is no {RECORD_FILE} in it{hint}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; save or copy the adapter again") from error
    version = record.get("format_version") if isinstance(record, dict) else None
    if not isinstance(version, int):
        raise ValueError(f"{path} is not the record of a HyLoRADA adapter: it has no format_version")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, this hylorada reads up to {FORMAT_VERSION}; install a newer hylorada"
        )
    checksum = record.pop("checksum", None)
    if checksum != record_checksum(record):
        raise ValueError(f"{path} is damaged or was edited: its checksum does not fit; save or copy the adapter again")
    return record


def _full_model_files(directory: Path) -> list[Path]:
    return sorted(path for pattern in FULL_MODEL_FILES for path in directory.glob(pattern))


def _sampled_row_norms(tensor: Tensor) -> list[float]:
    rows = _spread(range(tensor.shape[0]), SAMPLED_ROWS)
    return tensor.detach()[rows].float().flatten(1).norm(dim=1).tolist()


def _spread(items: Any, count: int) -> list:
    """At most `count` items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[index * (len(items) - 1) // (count - 1)] for index in range(count)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _exchange(directory: Path, new: Path, old: Path, obsolete: tuple[str, ...]) -> None:
    arriving = [path.name for path in new.iterdir()]
    leaving = [path.name for pattern in obsolete for path in directory.glob(pattern) if path.name not in arriving]
    kept = [name for name in {*arriving, *leaving} if (directory / name).exists()]
    for name in kept:
        _link_or_copy(directory / name, old / name)
    mark = new.parent / MARK_FILE
    unfinished = mark.with_suffix(".part")
    with unfinished.open("wb") as file:
        file.write(json.dumps(leaving).encode())
        file.flush()
        os.fsync(file.fileno())
    os.rename(unfinished, mark)
    try:
        for name in arriving:
            os.replace(new / name, directory / name)
        for name in leaving:
            os.unlink(directory / name)
    except BaseException:
        mark.unlink()
        for name in arriving:
            if name not in kept:
                (directory / name).unlink(missing_ok=True)
        for name in kept:
            os.replace(old / name, directory / name)
        raise


def _finish(directory: Path) -> None:
    for mark in directory.glob(f"{SCRATCH_PREFIX}*/{MARK_FILE}"):
        for path in (mark.parent / "new").iterdir():
            os.replace(path, directory / path.name)
        for name in json.loads(mark.read_bytes()):
            # a name, never a path to somewhere else
            (directory / Path(name).name).unlink(missing_ok=True)
        shutil.rmtree(mark.parent)


@contextmanager
def _locked(directory: Path, shared: bool) -> Iterator[None]:
    """Wait for whoever writes the folder (for readers too, unless `shared`); the lock ends with its process."""
    if fcntl is None:
        yield
        return
    try:
        handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        # nothing to read: the reader says so
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        except OSError as error:
            # some network file systems know no locks
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        yield
    finally:
        os.close(handle)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
