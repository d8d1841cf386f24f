"""The command line: a new user's path over a tiny model, and what it says where something is wrong."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hylorada import HyLoRADAModel
from hylorada.cli import app
from hylorada.config import HyLoRADAConfig
from hylorada.run_file import Run
from hylorada.trainer import HyLoRADATrainer


def call(*arguments):
    """-> what the command wrote; it must end well."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def failure(*arguments):
    """-> the one line of the error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    # warnings of libraries may stand before it, a traceback may not
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    last = result.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith("error: ")
    return last


def tree(directory):
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}


@pytest.fixture
def run_file(saved_model, texts, tmp_path):
    """A file of four steps with two checkpoints on the way."""
    path = tmp_path / "run.yaml"
    values = {
        "model": {"name": str(saved_model)},
        "data": {"name": str(texts), "max_length": 32, "num_test": 6},
        "method": "hylorada",
        "adapter": {"lora_rank": 4, "position_bias_enabled": False, "gradient_checkpointing": False},
        "training": {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2, "mixed_precision": "fp32"},
        "output": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(values))
    return path


def adapter_of(output):
    return load_file(output / "adapter" / "adapter.safetensors")


def test_a_resumed_run_is_the_uninterrupted_one(run_file, tmp_path):
    out = tmp_path / "out"
    assert "completed after 4 steps" in call("train", run_file)
    whole = adapter_of(out)
    assert any(tensor.abs().sum() > 0 for name, tensor in whole.items() if name.endswith("lora_b"))
    shutil.rmtree(out / "checkpoint-4")
    shutil.rmtree(out / "adapter")
    assert 'resume="latest"' in failure("train", run_file)
    assert "completed after 4 steps" in call("train", run_file, "--resume")
    resumed = adapter_of(out)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_terminated_run_leaves_a_checkpoint_to_go_on_from(run_file, tmp_path, monkeypatch):
    step = HyLoRADATrainer._step

    def step_and_signal(self, run, group):
        record = step(self, run, group)
        os.kill(os.getpid(), signal.SIGTERM)
        return record

    monkeypatch.setattr(HyLoRADATrainer, "_step", step_and_signal)
    result = CliRunner().invoke(app, ["train", str(run_file)])
    assert result.exit_code == 1 and "terminated after step 1; go on" in result.stdout
    assert (tmp_path / "out" / "checkpoint-1").is_dir() and not (tmp_path / "out" / "adapter").exists()
    monkeypatch.undo()
    assert "completed after 4 steps" in call("train", run_file, "--resume")


def test_an_adapter_that_could_not_be_saved_is_saved_by_resuming(run_file, tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(HyLoRADAModel, "save_pretrained", full_disk)
    assert "no space left" in failure("train", run_file)
    monkeypatch.undo()
    assert "completed after 4 steps" in call("train", run_file, "--resume")
    saved = adapter_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    call("train", run_file)
    whole = adapter_of(tmp_path / "out")
    assert whole.keys() == saved.keys() and all(torch.equal(whole[name], saved[name]) for name in whole)


def test_the_path_of_a_new_user(run_file, saved_model, texts, tmp_path, token_ids):
    out = tmp_path / "out"
    trained = call("train", run_file, "--set", "training.max_steps=8", "--set", "training.seed=3")
    held_out = float(trained.split("held-out loss after step 8: ")[1].split()[0])

    # the trainer's last evaluation, again
    evaluated = call("eval", out)
    assert float(evaluated.split("loss ")[1].split()[0]) == pytest.approx(held_out, abs=2e-4)
    assert "6 blocks" in evaluated
    assert call("eval", saved_model, "--data", texts, "--max-length", 32) != evaluated
    # the folder of the adapter alone knows its base, but no text
    assert "give --data" in failure("eval", out / "adapter")

    prompt = "and the word"
    written = call("generate", out, prompt, "--max-new-tokens", 8)
    assert written == call("generate", out, prompt, "--max-new-tokens", 8)
    assert written.strip() and len(written.strip("\n")) <= 8
    drawn = [call("generate", out, prompt, "--temperature", 3, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]

    model = HyLoRADAModel.from_pretrained(AutoModelForCausalLM.from_pretrained(saved_model), out / "adapter").eval()
    expected = model(input_ids=token_ids).logits

    said = call("merge", out, tmp_path / "merged", "--blocks", 4)
    assert "merged beside adapted in float32" in said
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(input_ids=token_ids).logits, expected, rtol=1e-4, atol=1e-4)
    again = call("eval", tmp_path / "merged", "--data", texts, "--blocks", 6, "--max-length", 32)
    assert again == call("eval", out / "adapter", "--data", texts, "--blocks", 6, "--max-length", 32)

    call("export", out, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["use_dora"]
    call("convert", tmp_path / "peft", tmp_path / "back")
    back = load_file(tmp_path / "back" / "adapter.safetensors")
    assert back.keys() == adapter_of(out).keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in adapter_of(out).items())
    call("convert", tmp_path / "back", tmp_path / "peft-again")
    for name, tensor in load_file(tmp_path / "peft" / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "peft-again" / "adapter_model.safetensors")[name])

    said = call("export", out, tmp_path / "lora", "--to", "lora", "--rank", 16)
    assert float(said.split("updates: ")[1].split()[0]) < 0.2
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 16


def test_a_run_may_pack_its_rows_and_hold_nothing_out(run_file, tmp_path, texts):
    options = ["--set", "training.max_steps=null", "--set", "data.pack=true", "--set", "data.test_fraction=0"]
    said = call("train", run_file, *options)
    assert "held-out" not in said
    steps = int(said.split("completed after ")[1].split()[0])
    # a token a character; every document ends in a block of its own, which a packed row shares with others
    lengths = [len(path.read_text()) for path in texts.iterdir()]
    assert -(-sum(lengths) // 32) <= steps < sum(-(-length // 32) for length in lengths)
    assert "the run holds nothing out" in failure("eval", tmp_path / "out")
    said = call("merge", tmp_path / "out", tmp_path / "merged", "--data", texts, "--blocks", 2, "--dtype", "bf16")
    assert "in float32" in said and "in bfloat16" in said
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_an_adapter_of_peft_is_evaluated_as_what_it_was_exported_from(run_file, texts, tmp_path):
    call("train", run_file)
    call("export", tmp_path / "out", tmp_path / "peft")
    options = ["--data", texts, "--blocks", 5, "--max-length", 32]
    assert call("eval", tmp_path / "peft", *options) == call("eval", tmp_path / "out", *options)


def test_full_evaluation_is_json(run_file, tmp_path):
    call("train", run_file)
    found = json.loads(call("eval", tmp_path / "out", "--full", "--max-length", 640, "--samples", 1))
    assert found["config"]["lora_rank"] == 4 and found["perplexity"] > 1
    assert found["passkey"] and found["lost_in_the_middle"]
    assert "--samples 3 is for --full" in failure("eval", tmp_path / "out", "--samples", 3)
    assert "leave out --blocks" in failure("eval", tmp_path / "out", "--full", "--blocks", 2)


def test_a_dry_run_says_what_would_be_trained_and_writes_nothing(run_file, saved_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    said = call("train", run_file, "--dry-run", "--set", "adapter.daa_enabled=true", "--set", "training.seed=7")
    assert tree(tmp_path) == before
    resolved = yaml.safe_load(said[: said.index("┏")])
    assert resolved["training"]["seed"] == 7 and resolved["training"]["learning_rate"] == 1e-2
    assert HyLoRADAConfig.from_dict(resolved["adapter"]).daa_enabled
    model = HyLoRADAModel(AutoModelForCausalLM.from_pretrained(saved_model), HyLoRADAConfig(**resolved["adapter"]))
    counts = model.count_params()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if line.startswith("│")]
    assert ["trainable", f"{counts['trainable']:,}"] in rows
    states = {row[0]: row[1:3] for row in rows if len(row) == 4}
    assert states["daa"] == ["on", f"{counts['daa']:,}"] and states["position_bias"] == ["off", "0"]
    assert "at the peak, MiB" in said


def test_the_record_of_a_run_is_the_run(run_file, tmp_path):
    changes = ["training.learning_rate=2e-3", "adapter.lora_target_modules=[q_proj]", "method=dora", "data.pack=true"]
    run = Run.load(run_file, changes)
    assert run.training.learning_rate == 2e-3 and run.adapter.lora_target_modules == ("q_proj",)
    assert not run.adapter.use_rslora and run.adapter.use_dora_magnitude
    (tmp_path / "out").mkdir()
    run.save()
    assert Run.load(tmp_path / "out" / "run.yaml") == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.learning_rat=1", "training has no field 'learning_rat'; did you mean 'learning_rate'?"),
        ("adapter.lora_rnk=1", "adapter has no field 'lora_rnk'; did you mean 'lora_rank'?"),
        ("data.max_lenght=9", "data has no field 'max_lenght'; did you mean 'max_length'?"),
        ("modle.name=x", "has no field 'modle'; did you mean 'model'?"),
        ("method=lorra", "there is no preset 'lorra'"),
        ("training.learning_rate=fast", "learning_rate must be a number"),
        ("data.name=nowhere", "unknown dataset 'nowhere'"),
        ("model.dtype=int8", "model.dtype must be one of fp32, bf16, fp16, got 'int8'"),
        ("training.output_dir=x", "training.output_dir is the run's output"),
        ("output=null", "output must be a text"),
        ("data.test_fraction=1", "data.test_fraction must be in [0, 1)"),
        ("training.seed", "section.field=value"),
        ("method.name=x", "method has no fields"),
        ("adapter.lora_target_modules=[nothing]", "nothing"),
    ],
)
def test_what_is_wrong_with_a_run_is_one_line(run_file, tmp_path, change, message):
    before = tree(tmp_path)
    assert message in failure("train", run_file, "--set", change)
    assert tree(tmp_path) == before


def test_errors_are_one_line_and_tracebacks_come_with_debug(run_file, tmp_path, saved_model):
    assert "nowhere.yaml" in failure("train", tmp_path / "nowhere.yaml")
    assert "no folder of a run, nor of an adapter" in failure("export", saved_model, tmp_path / "x")
    assert "cannot be had" in failure("eval", tmp_path / "nowhere", "--data", "kjv")
    assert "--to must be peft or lora" in failure("export", saved_model, tmp_path / "x", "--to", "onnx")
    assert "needs --rank" in failure("export", saved_model, tmp_path / "x", "--to", "lora")
    assert "needs --to lora" in failure("export", saved_model, tmp_path / "x", "--rank", 4)
    assert "holds none" in failure("generate", saved_model, "and", "--base", saved_model)
    assert "does nothing at temperature 0" in failure("generate", saved_model, "and", "--top-p", 0.5)
    assert "has no token" in failure("generate", saved_model, "")
    for arguments in (["--debug", "train"], ["train", "--debug"]):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / "nowhere.yaml")])
        assert isinstance(result.exception, FileNotFoundError)


def test_the_plan_is_the_library_s(saved_model):
    from hylorada.plan import plan

    planned = plan(str(saved_model), "dora", length=48, dtype="bf16", lora_rank=4, memory=2**30)
    options = ["--length", 48, "--dtype", "bf16", "--set", "lora_rank=4", "--memory", 1]
    said = call("plan", saved_model, "--method", "dora", *options)
    assert planned.table() in said and planned.advice() in said and "fits into 1 GiB" in said
    assert "did you mean 'lora_rank'?" in failure("plan", saved_model, "--length", 8, "--set", "lora_rnk=4")
    assert "written field=value" in failure("plan", saved_model, "--length", 8, "--set", "lora_rank")


def test_the_doctor_names_versions_and_missing_extras(monkeypatch):
    import importlib.metadata

    version = importlib.metadata.version

    def without_peft(package):
        if package == "peft":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", without_peft)
    said = call("doctor")
    assert f"transformers  {version('transformers')}" in said and f"torch    {torch.__version__}" in said
    assert "not installed: pip install 'hylorada[peft]'" in said


def test_the_shell_completes_commands_and_choices():
    def completions(words):
        environment = {
            "_HYLORADA_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(["hylorada", *words]),
            "COMP_CWORD": str(len(words)),
        }
        return CliRunner().invoke(app, [], prog_name="hylorada", env=environment).stdout.split()

    assert {"train", "eval", "export"} <= set(completions([""]))
    assert completions(["tr"]) == ["train"]
    assert completions(["export", "--to", "lo"]) == ["lora"]
    assert completions(["plan", "--method", "lora"]) == ["lora", "lorada"]
    assert completions(["benchmark", "--lr"]) == ["--lr", "--lr_grid", "--lr_scheduler"]
    assert completions(["benchmark", "--steps", "3", "--dtype", ""]) == ["fp32", "bf16"]
    assert completions(["ablate", "--ablation", "a"]) == ["attention", "author"]
    assert "--arms" in completions(["ablate", "--"]) and "--arms" not in completions(["benchmark", "--"])
