"""Trackers: every step and evaluation once, also after a resumption, and a missing package before anything runs."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from hylorada import trackers
from hylorada.data import collate
from hylorada.trainer import HyLoRADATrainer, TrainingConfig

ROWS = [{"input_ids": list(range(3, 3 + length))} for length in (5, 9, 4, 7, 3, 6)]


def trainer(model, **fields):
    defaults = {"mixed_precision": "fp32", "show_progress": False, "eval_steps": 2}
    batches = DataLoader(ROWS, batch_size=1, collate_fn=collate)
    return HyLoRADATrainer(model, batches, batches, config=TrainingConfig(**defaults | fields))


def logged(folder):
    return [json.loads(line) for line in (folder / trackers.LOG_FILE).read_text().splitlines()]


def expected_lines(result):
    lines = []
    for record in result.steps:
        values = {name: getattr(record, name) for name in ("loss", "learning_rate", "grad_norm", "tokens", "seconds")}
        lines.append({"step": record.step, **values})
        if record.step in result.eval_losses:
            lines.append({"step": record.step, "eval_loss": result.eval_losses[record.step]})
    return lines


def test_jsonl_has_every_step_and_evaluation(make_model, tmp_path):
    result = trainer(make_model(), tracker="jsonl", output_dir=tmp_path).train()
    assert len(result.steps) == 6 and sorted(result.eval_losses) == [2, 4, 6]
    assert logged(tmp_path) == expected_lines(result)


def test_the_log_of_a_resumed_run_has_every_step_once(make_model, tmp_path, monkeypatch):
    trainer(make_model(), tracker="jsonl", output_dir=tmp_path, save_steps=3).train()
    # as a crash after the fifth step leaves it
    (tmp_path / "checkpoint-6").rename(tmp_path / "away")
    log = tmp_path / trackers.LOG_FILE
    log.write_text("\n".join(log.read_text().splitlines()[:7]) + "\n")
    result = trainer(make_model(), tracker="jsonl", output_dir=tmp_path, save_steps=3, resume=True).train()
    assert logged(tmp_path) == expected_lines(result) and len(result.steps) == 6


def test_lines_are_strict_json(tmp_path):
    tracker = trackers.JsonLines(tmp_path)
    tracker.log({"loss": 1.5, "grad_norm": float("inf")}, step=1)
    tracker.finish()
    assert logged(tmp_path) == [{"step": 1, "loss": 1.5, "grad_norm": None}]


def test_a_log_stays_readable_when_training_fails(make_model, tmp_path):
    model = make_model()
    run = trainer(model, tracker="jsonl", output_dir=tmp_path)
    step = run._step

    def step_until_three(*arguments):
        record = step(*arguments)
        if record.step == 3:
            raise KeyboardInterrupt
        return record

    run._step = step_until_three
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert [line["step"] for line in logged(tmp_path)] == [1, 2, 2, 3]


def test_tensorboard_gets_the_losses(make_model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = trainer(make_model(), tracker="tensorboard", output_dir=tmp_path, save_steps=3).train()
    events = EventAccumulator(str(tmp_path / "hylorada"))
    events.Reload()
    for name, values in (
        ("loss", {record.step: record.loss for record in result.steps}),
        ("eval_loss", result.eval_losses),
    ):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_runs(make_model, tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    with pytest.raises(RuntimeError, match=rf'tracker "{name}" needs the package {name}: pip install'):
        trainer(make_model(), tracker=name, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_tracking_changes_nothing(make_model, tmp_path):
    models = [make_model(start=True, lora_dropout=0.3) for _ in range(2)]
    trainer(models[0], tracker="jsonl", output_dir=tmp_path).train()
    trainer(models[1]).train()
    for (name, tracked), plain in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(tracked, plain), name
