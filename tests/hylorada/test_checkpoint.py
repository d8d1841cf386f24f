"""Checkpoint folders: what goes in comes out, in safetensors and JSON, and nothing half written or damaged is taken."""

import json
import math
import os
import shutil

import pytest
import torch

from hylorada import checkpoint
from hylorada.checkpoint import STATE_FILE, TENSORS_FILE, checkpoints, load_checkpoint, save_checkpoint

shared = torch.arange(6.0)
STATE = {
    "parameters": {"layer.weight": torch.randn(3, 2), "half": torch.tensor([0.1, -3.0], dtype=torch.bfloat16)},
    "optimizer": {
        "state": {0: {"step": torch.tensor(4.0), "exp_avg": shared[:3]}, 7: {"exp_avg": shared[3:], "steps": 9}},
        "param_groups": [{"betas": (0.9, 0.999), "foreach": None, "lr": 0.1 + 0.2, "params": [0, 7], "amsgrad": False}],
    },
    "random": torch.arange(5, dtype=torch.uint8),
    "steps": [(1, 2.5, math.inf), (2, 1 / 3, -0.0)],
    "losses": [[4, math.nan]],
    "empty": {"tensor": torch.zeros(0, 3), "list": [], "tuple": (), "dict": {}},
    "odd keys": {"__tensor__": "no tensor", 2: "two", "2": "text"},
    "transposed": torch.arange(6).reshape(2, 3).T,
}


def assert_same(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_same(actual[key], value)
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
    else:
        assert repr(actual) == repr(expected)


def test_a_tree_comes_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path / "new" / "run", 12, STATE)
    assert path == tmp_path / "new" / "run" / "checkpoint-12"
    assert_same(load_checkpoint(path), STATE)


def test_a_checkpoint_is_two_files_without_pickle(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE)
    assert sorted(os.listdir(path)) == [STATE_FILE, TENSORS_FILE]
    assert json.loads((path / STATE_FILE).read_text())["format_version"] == 1
    header = (path / TENSORS_FILE).read_bytes()
    assert json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["/parameters/half"]["dtype"] == "BF16"


def test_objects_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(TypeError, match=r"/optimizer/state/0/closure is a function: train with an optimizer"):
        save_checkpoint(tmp_path, 1, {"optimizer": {"state": {0: {"closure": assert_same}}}})
    assert os.listdir(tmp_path) == []


def test_the_last_checkpoints_are_kept_by_step(tmp_path):
    for step in (2, 9, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
        assert load_checkpoint(checkpoints(tmp_path)[-1]) == {"step": step}
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-100"]


def test_other_names_are_no_checkpoints(tmp_path):
    save_checkpoint(tmp_path, 3, {})
    for name in ("checkpoint-best", "checkpoint-4.old", ".saving-5", ".removing-checkpoint-1", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-6").write_text("a file")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3"]
    assert checkpoints(tmp_path / "absent") == []
    save_checkpoint(tmp_path, 7, {}, keep=1)
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-4.old",
        "checkpoint-6",
        "checkpoint-7",
        "checkpoint-best",
        "notes",
    ]


def test_every_file_is_on_the_disk_before_the_name_and_the_name_before_the_removal(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, STATE)
    events = []
    sync, rename, rmtree = checkpoint.sync, os.rename, shutil.rmtree

    def record(kind, original):
        def call(path, *rest, **options):
            events.append(" ".join([kind, *(os.path.relpath(p, tmp_path) for p in (path, *rest))]))
            return original(path, *rest, **options)

        return call

    monkeypatch.setattr(checkpoint, "sync", record("sync", sync))
    monkeypatch.setattr(os, "rename", record("rename", rename))
    monkeypatch.setattr(shutil, "rmtree", record("remove", rmtree))
    save_checkpoint(tmp_path, 2, STATE, keep=1)
    assert events == [
        f"sync .saving-2/{TENSORS_FILE}",
        f"sync .saving-2/{STATE_FILE}",
        "sync .saving-2",
        "rename .saving-2 checkpoint-2",
        "sync .",
        "rename checkpoint-1 .removing-checkpoint-1",
        "sync .",
        "remove .removing-checkpoint-1",
    ]


@pytest.mark.parametrize("failing", ["save_file", "sync", "sha256_of"])
def test_a_full_disk_is_an_os_error_and_earlier_checkpoints_stay(tmp_path, monkeypatch, failing):
    save_checkpoint(tmp_path, 1, STATE)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(OSError, match=r"cannot save .*checkpoint-2: .*No space left.*earlier .* unchanged"):
        save_checkpoint(tmp_path, 2, STATE, keep=1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["checkpoint-1"]
    assert_same(load_checkpoint(tmp_path / "checkpoint-1"), STATE)


def test_a_checkpoint_is_never_written_over(tmp_path):
    save_checkpoint(tmp_path, 1, STATE)
    with pytest.raises(OSError, match=r"cannot save .*checkpoint-1"):
        save_checkpoint(tmp_path, 1, {})
    assert_same(load_checkpoint(tmp_path / "checkpoint-1"), STATE)


@pytest.mark.parametrize("name", [STATE_FILE, TENSORS_FILE])
def test_every_damage_is_noticed(tmp_path, name):
    file = save_checkpoint(tmp_path, 1, STATE) / name
    content = file.read_bytes()
    for place in range(0, len(content) - 1, max(1, len(content) // 60)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(ValueError, match=rf"{name}"):
            load_checkpoint(tmp_path / "checkpoint-1")
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"is damaged: .*resume from another checkpoint"):
        load_checkpoint(tmp_path / "checkpoint-1")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"is no checkpoint of a training run: there is no {name}"):
        load_checkpoint(tmp_path / "checkpoint-1")


def test_a_newer_format_is_refused(tmp_path):
    file = save_checkpoint(tmp_path, 1, STATE) / STATE_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    with pytest.raises(ValueError, match=r"format version 2, this hylorada reads up to 1; install a newer hylorada"):
        load_checkpoint(tmp_path / "checkpoint-1")


def test_a_foreign_record_is_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, STATE)
    for content in ("[]", "{}", "null", "checkpoint"):
        (path / STATE_FILE).write_text(content)
        with pytest.raises(ValueError, match="is damaged"):
            load_checkpoint(path)
