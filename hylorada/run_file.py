"""The file of a training run: its model, data, method and training in YAML, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import HyLoRADAConfig, check_names, parse_yaml, real_number, whole_number
from .data import Document, split_documents
from .pretrained import DTYPES
from .sources import load_documents, stream_documents
from .trainer import TrainingConfig

# what a run leaves in its output folder, beside checkpoints and logs
RUN_FILE = "run.yaml"
ADAPTER_FOLDER = "adapter"

_SECTIONS = ("model", "data", "method", "adapter", "training", "output")


@dataclass(frozen=True)
class ModelSection:
    """name: as `load_pretrained` takes it.   dtype: of the base model's weights, "fp32", "bf16" or "fp16"."""

    name: str
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        _check_text("model.name", self.name)
        if self.dtype not in DTYPES:
            raise ValueError(f"model.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass(frozen=True)
class DataSection:
    """What is trained on, and what is held out.

    name, split, limit: as `load_documents` takes them
    max_length: tokens of a block.   pack: several short blocks in one row of training
    test_fraction, seed: of the split by document, as `split_documents` takes them; 0 holds nothing out
    num_train, num_test: blocks, evenly spread; None takes all
    """

    name: str
    split: str | None = None
    limit: int | None = None
    max_length: int = 512
    pack: bool = False
    test_fraction: float = 0.2
    seed: int = 0
    num_train: int | None = None
    num_test: int | None = 64

    def __post_init__(self) -> None:
        _check_text("data.name", self.name)
        whole_number("data.max_length", self.max_length, 2)
        whole_number("data.seed", self.seed, 0)
        for name in ("limit", "num_train", "num_test"):
            if getattr(self, name) is not None:
                whole_number(f"data.{name}", getattr(self, name), 1)
        if not isinstance(self.pack, bool):
            raise TypeError(f"data.pack must be true or false, got {self.pack!r}")
        real_number("data.test_fraction", self.test_fraction, "in [0, 1)", lambda number: 0 <= number < 1)
        # reads nothing yet, but knows which names there are
        stream_documents(self.name, split=self.split, limit=self.limit)


@dataclass(frozen=True)
class Run:
    """A training run.

    method: a preset of HyLoRADAConfig.   adapter: the preset with what the file changes of it.
    output: the folder for checkpoints, logs, the adapter and this record.
    """

    model: ModelSection
    data: DataSection
    method: str
    adapter: HyLoRADAConfig
    training: TrainingConfig
    output: Path

    @classmethod
    def load(cls, path: str | os.PathLike, changes: Sequence[str] = ()) -> Run:
        """The run in a YAML file.

        changes: "section.field=value" or "method=value", values in YAML; they win over the file

        Raises:
            OSError: the file cannot be read.   TypeError, ValueError: it, or a change, is no such run.
        """
        try:
            values = parse_yaml(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold the sections {', '.join(_SECTIONS)}, got {values!r}")
        for change in changes:
            _apply(values, change)
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """The inverse of to_dict; absent fields take their defaults, unknown ones are an error."""
        check_names("the file of a run", values, _SECTIONS)
        for needed, example in (("model", "{name: smollm2-135m}"), ("data", "{name: kjv}"), ("output", "runs/first")):
            if needed not in values:
                raise ValueError(f"the file of a run needs {needed}, such as {needed}: {example}")
        _check_text("output", values["output"])
        method = values.get("method", "hylorada")
        _check_text("method", method)
        training = _section(values, "training", TrainingConfig)
        if "output_dir" in training:
            raise ValueError("training.output_dir is the run's output: leave it out, and give output")
        return cls(
            model=ModelSection(**_section(values, "model", ModelSection)),
            data=DataSection(**_section(values, "data", DataSection)),
            method=method,
            adapter=HyLoRADAConfig.preset(method, **_section(values, "adapter", HyLoRADAConfig)),
            training=TrainingConfig(**training, output_dir=values["output"]),
            output=Path(values["output"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field of every section, in values that YAML knows."""
        training = dataclasses.asdict(self.training)
        del training["output_dir"]
        return {
            "model": dataclasses.asdict(self.model),
            "data": dataclasses.asdict(self.data),
            "method": self.method,
            "adapter": self.adapter.to_dict(),
            "training": training,
            "output": str(self.output),
        }

    def to_yaml(self) -> str:
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def save(self) -> None:
        """Write the record into the output folder, without what was asked of this start alone."""
        run = dataclasses.replace(self, training=dataclasses.replace(self.training, resume=None))
        (self.output / RUN_FILE).write_text(run.to_yaml(), encoding="utf-8")

    @property
    def precision(self) -> str:
        """Of the autocast."""
        return self.training.mixed_precision or self.adapter.mixed_precision

    @property
    def batch_size(self) -> int:
        return self.training.per_device_batch_size or 1

    def documents(self) -> tuple[list[Document], list[Document]]:
        """The training and the held-out documents; none of the latter with test_fraction 0."""
        data = self.data
        documents = load_documents(data.name, split=data.split, limit=data.limit)
        return split_documents(documents, data.test_fraction, data.seed) if data.test_fraction else (documents, [])


def _apply(values: dict[str, Any], change: str) -> None:
    key, separator, text = change.partition("=")
    section, dot, field = key.partition(".")
    if not separator or not section or bool(dot) != bool(field):
        raise ValueError(
            f"a change is written section.field=value, such as training.learning_rate=1e-3, got {change!r}"
        )
    value = parse_yaml(text)
    if not dot:
        values[section] = value
        return
    if values.get(section) is None:
        values[section] = {}
    if not isinstance(values[section], dict):
        raise ValueError(f"{section} has no fields: write {section}=value, got {change!r}")
    values[section][field] = value


def _section(values: dict[str, Any], name: str, kind: type) -> dict[str, Any]:
    section = values.get(name)
    section = {} if section is None else section
    if not isinstance(section, dict):
        raise TypeError(f"{name} must hold fields and their values, got {section!r}")
    fields = dataclasses.fields(kind)
    check_names(name, section, [field.name for field in fields])
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in section:
            raise ValueError(f"{name} needs {field.name}")
    return dict(section)


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{name} must be a text, got {value!r}")
