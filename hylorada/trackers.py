"""Where the numbers of a training run go: nowhere, a JSON-lines file, or a tracker of accelerate."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process

TRACKERS = ("none", "jsonl", "tensorboard", "wandb", "trackio")
# these write into output_dir
FILE_TRACKERS = ("jsonl", "tensorboard")
LOG_FILE = "log.jsonl"

_PACKAGES = {"tensorboard": "hylorada[tensorboard]", "wandb": "wandb", "trackio": "trackio"}


def require_tracker(name: str) -> None:
    """RuntimeError where the package of a tracker is not installed."""
    # accelerate leaves out, without a word, what it does not find
    if name in _PACKAGES and name not in map(str, get_available_trackers()):
        raise RuntimeError(f'tracker "{name}" needs the package {name}: pip install "{_PACKAGES[name]}"')


class JsonLines(GeneralTracker):
    """One line of JSON for each call of `log`: its step and its values, null where one is not finite."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, output_dir: str | os.PathLike) -> None:
        super().__init__()
        self.path = Path(output_dir, LOG_FILE)
        self._file: IO[str] | None = None

    @property
    def tracker(self) -> Path:
        return self.path

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    @on_main_process
    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
