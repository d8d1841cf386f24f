"""Runs that stop and go on bit for bit, from any step, after any death; what is refused before anything changes."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from hylorada.checkpoint import checkpoints
from hylorada.data import collate
from hylorada.trainer import HyLoRADATrainer, TrainingConfig

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [12, 5, 9, 2, 16, 7, 11, 3, 8]
IDS = torch.randint(3, 97, (16,), generator=torch.Generator().manual_seed(2)).tolist()
ROWS = [{"input_ids": IDS[i:] + IDS[: i + n - 16] if i + n > 16 else IDS[i : i + n]} for i, n in enumerate(LENGTHS)]
# 5 batches: two groups of 2 and one of 1 in each of two epochs
STEPS = 6


def run(model, sampler="shuffled", evaluation=True, rows=ROWS, optimizer=None, **fields):
    orders = {
        "shuffled": lambda: {"shuffle": True},
        "weighted": lambda: {"sampler": WeightedRandomSampler([1.0] * len(rows), 9)},
        None: dict,
    }
    defaults = {
        "num_epochs": 2,
        "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2,
        "mixed_precision": "bf16",
        "lr_scheduler": "cosine",
        "warmup_ratio": 0.2,
        "eval_steps": 2,
        "seed": 3,
        "show_progress": False,
    }
    return HyLoRADATrainer(
        model,
        DataLoader(rows, batch_size=2, collate_fn=collate, **orders[sampler]()),
        DataLoader(ROWS[:4], batch_size=2, collate_fn=collate) if evaluation else None,
        config=TrainingConfig(**defaults | fields),
        optimizer=optimizer,
    ).train()


@pytest.fixture
def adapted(make_model):
    return lambda **fields: make_model(start=True, lora_dropout=0.3, **fields)


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same_run(actual, expected, actual_model, expected_model):
    assert [r[:-1] for r in map(values_of, actual.steps)] == [r[:-1] for r in map(values_of, expected.steps)]
    assert actual.eval_losses == expected.eval_losses
    found = trained(actual_model)
    for name, value in trained(expected_model).items():
        assert torch.equal(found[name], value), name


def values_of(record):
    return [record.step, record.loss, record.learning_rate, record.grad_norm, record.tokens, record.seconds]


def disturb_random_numbers():
    torch.seed()
    random.seed()
    np.random.seed()


@pytest.mark.parametrize(
    ("precision", "sampler"), [("bf16", "shuffled"), ("bf16", "weighted"), ("fp16", "shuffled"), ("fp32", "weighted")]
)
def test_a_run_resumed_at_any_step_is_the_uninterrupted_one(adapted, tmp_path, precision, sampler):
    whole_model = adapted()
    fields = {"sampler": sampler, "mixed_precision": precision}
    whole = run(whole_model, output_dir=tmp_path, save_steps=1, **fields)
    assert len(whole.steps) == STEPS and [path.name for path in checkpoints(tmp_path)] == [
        f"checkpoint-{step}" for step in range(1, STEPS + 1)
    ]
    for step in range(1, STEPS):
        disturb_random_numbers()
        model = adapted()
        resumed = run(model, resume=tmp_path / f"checkpoint-{step}", **fields)
        assert_same_run(resumed, whole, model, whole_model)


def test_a_whole_model_with_tied_weights_goes_on_too(make_base, tmp_path):
    models = [make_base("gpt2", tie_word_embeddings=True) for _ in range(2)]
    assert models[0].lm_head.weight is models[0].transformer.wte.weight
    whole = run(models[0], output_dir=tmp_path, save_steps=2)
    resumed = run(models[1], resume=tmp_path / "checkpoint-4")
    assert_same_run(resumed, whole, models[1], models[0])


class Endless(IterableDataset):
    def __iter__(self):
        return itertools.cycle(ROWS)


def test_data_without_length_goes_on_where_it_was(adapted, tmp_path):
    whole_model, model = adapted(), adapted()
    fields = {"sampler": None, "rows": Endless(), "max_steps": 5}
    whole = run(whole_model, output_dir=tmp_path, save_steps=3, **fields)
    resumed = run(model, resume=tmp_path / "checkpoint-3", **fields)
    # where the data goes on is not where it begins
    assert [record.tokens for record in whole.steps[3:]] != [record.tokens for record in whole.steps[:2]]
    assert_same_run(resumed, whole, model, whole_model)


class Drawing(torch.utils.data.Dataset):
    """Rows that depend on Python's and NumPy's random numbers."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, i):
        return {"input_ids": [3 + random.randrange(90), *ROWS[i]["input_ids"], 3 + int(np.random.randint(90))]}


def test_the_seed_reaches_every_source_of_random_numbers(adapted):
    losses = []
    for seed in (3, 3, 4):
        disturb_random_numbers()
        losses.append([record.loss for record in run(adapted(), rows=Drawing(), seed=seed).steps])
    assert losses[0] == losses[1] and losses[0][0] != losses[2][0]


def test_saving_changes_nothing(adapted, tmp_path):
    models = [adapted(), adapted()]
    saving = run(models[0], output_dir=tmp_path, save_steps=1)
    assert_same_run(saving, run(models[1]), *models)


def test_resumption_stands_on_every_restored_part(adapted, tmp_path, monkeypatch):
    """Without any one of them the run is another: none of the comparisons above is idle."""
    whole_model = adapted()
    whole = run(whole_model, output_dir=tmp_path, save_steps=1)
    from hylorada import run_state, trainer

    idle = {
        "random numbers": (run_state, "set_random_state", lambda *_: None),
        "optimizer": (trainer, "fill_optimizer", lambda *_: None),
        "parameters": (trainer, "fill", lambda *_: None),
        "position": (
            run_state.Batches,
            "_rest_of_epoch",
            lambda self: iter(self.loader),
        ),
    }
    for part, (owner, name, nothing) in idle.items():
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, nothing)
            resumed = run(adapted(), resume=tmp_path / "checkpoint-2")
        assert resumed.steps[2].loss != whole.steps[2].loss or resumed.steps[3].loss != whole.steps[3].loss, part


def test_a_resumed_run_keeps_saving_where_it_is(adapted, tmp_path):
    run(adapted(), output_dir=tmp_path, save_steps=2)
    for name in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / name).rename(tmp_path / f"away-{name}")
    result = run(adapted(), output_dir=tmp_path, save_steps=2, save_total_limit=2, resume=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-6"]
    assert result.checkpoint == tmp_path / "checkpoint-6"
    assert len(result.steps) == STEPS and result.ending == "completed"


def test_a_checkpoint_is_saved_at_the_end_without_save_steps(adapted, tmp_path):
    result = run(adapted(), output_dir=tmp_path)
    assert checkpoints(tmp_path) == [result.checkpoint] == [tmp_path / f"checkpoint-{STEPS}"]


def test_auto_starts_anew_where_there_is_nothing_and_goes_on_where_there_is(adapted, tmp_path):
    whole_model = adapted()
    whole = run(whole_model, output_dir=tmp_path / "whole", resume="auto")
    stop_at(adapted(), 4, output_dir=tmp_path / "stopped", resume="auto")
    model = adapted()
    assert_same_run(run(model, output_dir=tmp_path / "stopped", resume="auto"), whole, model, whole_model)


def stop_at(model, step, **fields):
    """Send SIGTERM to this process in the middle of a step."""

    def terminate(optimizer, *_):
        terminate.steps += 1
        if terminate.steps == step:
            os.kill(os.getpid(), signal.SIGTERM)

    terminate.steps = 0
    hook = register_optimizer_step_pre_hook(terminate)
    try:
        return run(model, **fields)
    finally:
        hook.remove()


@pytest.mark.parametrize("step", [1, 4])
def test_sigterm_finishes_the_step_saves_and_resumes(adapted, tmp_path, step):
    whole_model = adapted()
    whole = run(whole_model)
    before = signal.getsignal(signal.SIGTERM)
    stopped = stop_at(adapted(), step, output_dir=tmp_path, save_steps=10)
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped.ending == "terminated" and len(stopped.steps) == step
    assert checkpoints(tmp_path) == [stopped.checkpoint] == [tmp_path / f"checkpoint-{step}"]
    model = adapted()
    assert_same_run(run(model, output_dir=tmp_path, resume="latest"), whole, model, whole_model)


def test_sigterm_keeps_its_meaning_without_output_dir(adapted):
    received = []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append("mine"))
    try:
        result = stop_at(adapted(), 2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == ["mine"] and result.ending == "completed"


def test_a_thread_trains_and_leaves_sigterm_alone(adapted, tmp_path):
    handlers, results = [], []

    class Watch(torch.utils.data.Dataset):
        def __len__(self):
            return len(ROWS)

        def __getitem__(self, i):
            handlers.append(signal.getsignal(signal.SIGTERM))
            return ROWS[i]

    thread = threading.Thread(target=lambda: results.append(run(adapted(), rows=Watch(), output_dir=tmp_path)))
    thread.start()
    thread.join()
    assert results[0].ending == "completed" and set(handlers) == {signal.getsignal(signal.SIGTERM)}


def test_early_stopping_waits_for_its_patience(adapted, monkeypatch):
    losses = iter([3.0, 2.0, 1.95, 2.5, 1.94, 1.0])
    monkeypatch.setattr("hylorada.trainer.mean_loss", lambda *_: next(losses))
    fields = {"eval_steps": 1, "early_stopping_patience": 3}
    result = run(adapted(), early_stopping_threshold=0.1, **fields)
    # 1.95, 2.5 and 1.94 do not beat 2.0 by more than 0.1
    assert result.ending == "stopped early" and list(result.eval_losses.values()) == [3.0, 2.0, 1.95, 2.5, 1.94]

    losses = iter([3.0, 2.0, 1.95, 2.5, 1.94, 1.0])
    result = run(adapted(), **fields)
    assert result.ending == "completed" and len(result.eval_losses) == STEPS


def test_patience_survives_a_resumption(adapted, tmp_path, monkeypatch):
    fields = {"eval_steps": 1, "early_stopping_patience": 3}
    losses = iter([2.0, 2.1, 2.2, 2.3])
    monkeypatch.setattr("hylorada.trainer.mean_loss", lambda *_: next(losses))
    stop_at(adapted(), 2, output_dir=tmp_path, **fields)
    result = run(adapted(), output_dir=tmp_path, resume=True, **fields)
    assert result.ending == "stopped early" and len(result.steps) == 4
    again = run(adapted(), output_dir=tmp_path, resume=True, **fields)
    assert again.ending == "stopped early" and again.steps == result.steps


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_run_that_has_ended_is_put_back_as_it_ended(adapted, tmp_path, resume):
    first, second = adapted(), adapted()
    result = run(first, output_dir=tmp_path)
    files = contents(tmp_path)
    again = run(second, output_dir=tmp_path, resume=resume)
    assert again == result and contents(tmp_path) == files and not second.training
    for name, value in trained(first).items():
        assert torch.equal(trained(second)[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 2e-2}, "learning_rate is 0.02, and the checkpoint has 0.01"),
        ({"seed": 4}, "seed is 4, and the checkpoint has 3"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1"),
        ({"mixed_precision": "fp32"}, "precision is 'fp32', and the checkpoint has 'bf16'"),
        ({"num_epochs": 3}, "optimizer steps in all is 9, and the checkpoint has 6"),
        ({"rows": ROWS[:8]}, "batches of an epoch is 4|optimizer steps in all is 4"),
        ({"rows": [*ROWS, ROWS[0]]}, "rows of the data is 10, and the checkpoint has 9"),
    ],
)
def test_a_checkpoint_of_another_run_changes_nothing(adapted, tmp_path, change, message):
    run(adapted(), output_dir=tmp_path, save_steps=2, tracker="jsonl")
    model = adapted()
    before, files = trained(model), contents(tmp_path)
    with pytest.raises(ValueError, match=rf"cannot resume from .*checkpoint-6: this run: ({message})"):
        run(model, output_dir=tmp_path, resume=True, tracker="jsonl", **change)
    assert contents(tmp_path) == files and not model.training
    for name, value in trained(model).items():
        assert torch.equal(value, before[name])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_model_changes_nothing(adapted, make_model, make_base, tmp_path):
    run(adapted(), output_dir=tmp_path, save_steps=2)
    larger = make_model(start=True, lora_dropout=0.3, lora_rank=8)
    sharper = make_model(start=True, lora_dropout=0.3, lora_alpha=4.0)
    foreign = adapted()
    with torch.no_grad():
        foreign.base_model.lm_head.weight.mul_(2)
    for model, message in (
        (larger, r"the config of the model: lora_rank is 8, and the checkpoint has 4"),
        (sharper, r"the config of the model: lora_alpha is 4.0"),
        (foreign, r"wrong base model: .*lm_head.*resume with the base model that the checkpoint was made with"),
        (make_base(), r"parameter group"),
    ):
        before = trained(model)
        with pytest.raises(ValueError, match=rf"cannot resume from .*checkpoint-6: .*{message}"):
            run(model, output_dir=tmp_path, resume=True)
        assert all(torch.equal(value, before[name]) for name, value in trained(model).items())


def test_a_checkpoint_of_another_optimizer_is_refused(adapted, tmp_path):
    def sgd(model, **options):
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **options)

    model = adapted()
    run(model, output_dir=tmp_path, save_steps=2, optimizer=sgd(model, lr=0.1, momentum=0.5))
    for options, message in (
        ({"lr": 0.2, "momentum": 0.5}, "lr of parameter group 0 is 0.2, and the checkpoint has 0.1"),
        ({"lr": 0.1}, "momentum of parameter group 0"),
    ):
        model = adapted()
        with pytest.raises(ValueError, match=message):
            run(model, output_dir=tmp_path, resume=True, optimizer=sgd(model, **options))
    with pytest.raises(ValueError, match="optimizer is 'AdamW', and the checkpoint has 'SGD'"):
        run(adapted(), output_dir=tmp_path, resume=True)


def test_a_folder_of_another_run_is_not_written_into(adapted, tmp_path):
    run(adapted(), output_dir=tmp_path, save_steps=3)
    with pytest.raises(ValueError, match=r'holds checkpoint-6 of an earlier run: .*resume="latest"'):
        run(adapted(), output_dir=tmp_path)
    with pytest.raises(ValueError, match=r"holds checkpoint-6, and the run would go on from .*checkpoint-3"):
        run(adapted(), output_dir=tmp_path, resume=tmp_path / "checkpoint-3")


def test_there_must_be_something_to_resume(adapted, tmp_path):
    for resume in (True, "latest"):
        with pytest.raises(FileNotFoundError, match=r'holds no checkpoint.*resume="auto"'):
            run(adapted(), output_dir=tmp_path / "none", resume=resume)
    with pytest.raises(FileNotFoundError, match="is no checkpoint of a training run"):
        run(adapted(), resume=tmp_path)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"save_steps": 5}, ValueError, "save_steps=5 needs output_dir"),
        ({"save_total_limit": 1}, ValueError, "save_total_limit=1 needs output_dir"),
        ({"resume": "latest"}, ValueError, "resume='latest' needs output_dir"),
        ({"resume": True}, ValueError, "resume=True needs output_dir"),
        ({"tracker": "jsonl"}, ValueError, "tracker='jsonl' needs output_dir"),
        ({"tracker": "tensorboard"}, ValueError, "tracker='tensorboard' needs output_dir"),
        ({"tracker": "abacus"}, ValueError, "tracker must be one of none, jsonl, .*got 'abacus'"),
        ({"output_dir": 3}, TypeError, "output_dir must be a path or None, got 3"),
        ({"resume": 1}, TypeError, 'resume must be a path, "latest", .*got 1'),
        ({"output_dir": "x", "save_steps": 0}, ValueError, "save_steps must be at least 1"),
        ({"early_stopping_patience": 0}, ValueError, "early_stopping_patience must be at least 1"),
        ({"early_stopping_threshold": 0.1}, ValueError, "does nothing without early_stopping_patience"),
        ({"early_stopping_threshold": -1.0}, ValueError, "early_stopping_threshold must be 0 or more"),
    ],
)
def test_options_that_could_not_act_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        TrainingConfig(**fields)


def test_early_stopping_needs_something_to_watch(adapted):
    with pytest.raises(ValueError, match="early_stopping_patience=2 needs an eval_dataloader"):
        run(adapted(), evaluation=False, early_stopping_patience=2)


KILLED = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
import torch

# no threads before the fork
torch.set_num_threads(1)
from transformers import LlamaConfig, LlamaForCausalLM
from hylorada import HyLoRADAConfig, HyLoRADAModel, checkpoint, files
from hylorada.data import collate
from hylorada.trainer import HyLoRADATrainer, TrainingConfig

ROOT, STRIDE = Path(sys.argv[1]), int(sys.argv[2])
LONG = ("_pack", "_unpack", "_apart", "record_checksum", "sha256_of", "<listcomp>", "<genexpr>", "<dictcomp>")


def train(folder):
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64))
    model = HyLoRADAModel(base, HyLoRADAConfig(lora_rank=2, lora_dropout=0.3, gradient_checkpointing=False))
    rows = [{"input_ids": torch.randint(3, 97, (n,)).tolist()} for n in (12, 5, 9, 2, 16, 7, 11, 3, 8)]
    loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True, collate_fn=collate)
    torch.seed()
    config = TrainingConfig(num_epochs=2, learning_rate=1e-2, gradient_accumulation_steps=2, mixed_precision="bf16",
                            output_dir=folder, save_steps=2, save_total_limit=1, resume="auto", show_progress=False)
    result = HyLoRADATrainer(model, loader, config=config).train()
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    return {"losses": [record.loss.hex() for record in result.steps], "parameters": digest.hexdigest()}


def in_child(function, *arguments):
    child = os.fork()
    if child == 0:
        try:
            function(*arguments)
        finally:
            sys.stderr.flush()
            os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at_line(last, folder, count=None):
    # the second save: there is an earlier checkpoint, and it goes away in the end
    saves = lines = 0

    def trace(frame, event, _):
        nonlocal saves, lines
        code = frame.f_code
        if code.co_filename not in (checkpoint.__file__, files.__file__) or code.co_name in LONG:
            return None
        saves += event == "call" and code.co_name == "save_checkpoint"
        lines += event == "line" and saves == 2
        if lines == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    train(folder)
    if count:
        count.write_text(str(lines))


def killed_within(place, folder):
    saves = 0
    originals = checkpoint.save_checkpoint, checkpoint.save_file, Path.write_text, shutil.rmtree

    def die_after_half(path):
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_file(tensors, path, metadata):
        originals[1](tensors, path, metadata)
        if place == "tensors" and Path(path).parent.name == ".saving-4":
            die_after_half(path)

    def write_text(path, *arguments, **options):
        originals[2](path, *arguments, **options)
        if place == "record" and path.parent.name == ".saving-4":
            die_after_half(path)

    def rmtree(path, *arguments, **options):
        if place == "removal":
            next(path.iterdir()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        originals[3](path, *arguments, **options)

    checkpoint.save_file, Path.write_text, shutil.rmtree = save_file, write_text, rmtree
    train(folder)


def report(folder, name):
    visible = checkpoint.checkpoints(folder)
    for path in visible:
        checkpoint.load_checkpoint(path)
    found = {"visible": [path.name for path in visible]} | train(folder)
    (ROOT / f"{name}.json").write_text(json.dumps(found | {"left": sorted(os.listdir(folder))}))


in_child(report, ROOT / "whole", "whole")
in_child(killed_at_line, 10**9, ROOT / "counted", ROOT / "lines")
deaths = {f"line {n}": (killed_at_line, n) for n in range(1, int((ROOT / "lines").read_text()) + 1, STRIDE)}
deaths |= {f"within {place}": (killed_within, place) for place in ("tensors", "record", "removal")}
for name, (function, argument) in deaths.items():
    status = in_child(function, argument, ROOT / name)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (name, status)
    in_child(report, ROOT / name, name)
(ROOT / "deaths").write_text(json.dumps(list(deaths)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 6])
def test_killed_at_any_line_of_a_save_the_run_goes_on_bit_for_bit(tmp_path, stride):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    outcome = subprocess.run(
        [sys.executable, script, tmp_path, str(stride)], env=environment, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    whole = json.loads((tmp_path / "whole.json").read_text())
    deaths = json.loads((tmp_path / "deaths").read_text())
    assert len(whole["losses"]) == STEPS and len(deaths) > 40 / stride
    visible = set()
    for name in deaths:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        visible.add(tuple(found["visible"]))
        assert (found["losses"], found["parameters"]) == (whole["losses"], whole["parameters"]), name
        assert found["left"] == ["checkpoint-6"], name
    assert visible == {("checkpoint-2",), ("checkpoint-2", "checkpoint-4"), ("checkpoint-4",)}
