"""The training loop in two processes, copied (DDP) and sharded (FSDP2), against one process; and resumed there."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from hylorada.checkpoint import TENSORS_FILE

SCRIPT = """
import json, os, signal, sys
from pathlib import Path
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM
from hylorada import HyLoRADAConfig, HyLoRADAModel
from hylorada.data import collate
from hylorada.trainer import HyLoRADATrainer, TrainingConfig

folder, kind, precision, optimizer, batch_size, dropout, stop, lengths = sys.argv[1:]
torch.manual_seed(0)
base = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128))
model = HyLoRADAModel(base, HyLoRADAConfig(lora_rank=4, lora_dropout=float(dropout), gradient_checkpointing=False,
                                           landmark_enabled=True))
with torch.no_grad():
    for name, parameter in model.adapter_parameters().items():
        parameter.add_(0.03 * torch.randn_like(parameter))
rows = [{"input_ids": torch.randint(3, 97, (n,)).tolist()} for n in json.loads(lengths)]
if kind == "sharded":
    from torch.distributed.fsdp import fully_shard
    torch.distributed.init_process_group("gloo")
    for layer in model.base_model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert type(model.base_model.model.layers[0].self_attn.q_proj.lora_b.data).__name__ == "DTensor"
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(rows)

of_rows = torch.utils.data.DataLoader(rows, batch_size=int(batch_size), collate_fn=collate)
loader = of_rows
if kind == "stream":
    loader = torch.utils.data.DataLoader(Stream(), batch_size=int(batch_size), collate_fn=collate)
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
config = TrainingConfig(num_epochs=2, max_steps=4 if kind == "stream" else None, eval_steps=2,
                        gradient_accumulation_steps=2, mixed_precision=precision, show_progress=False,
                        output_dir=folder, max_grad_norm=0.7, resume="auto", save_steps=1)
chosen = torch.optim.SGD(trained, lr=0.2) if optimizer == "sgd" else None
if stop == "stop":
    def terminate(*_):
        if torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    register_optimizer_step_pre_hook(terminate)
if stop == "kill":
    def die(*_):
        if torch.distributed.get_rank() == 1 and Path(folder, "checkpoint-1").exists():
            os.kill(os.getpid(), signal.SIGKILL)
    model.register_forward_pre_hook(die)
result = HyLoRADATrainer(model, loader, of_rows, config=config, optimizer=chosen).train()
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
numbers = {"losses": [step.loss for step in result.steps], "tokens": [step.tokens for step in result.steps],
           "norms": [step.grad_norm for step in result.steps], "evaluations": list(result.eval_losses.values()),
           "ending": result.ending, "checkpoint": result.checkpoint.name,
           "processes": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1}
Path(folder, f"numbers-{rank}.json").write_text(json.dumps(numbers))
"""

# `accelerate launch --cpu` starts one process, or several with MPI; its other launcher takes gloo where there is no GPU
EVEN = [12, 5, 9, 2, 16, 7, 11, 3]
# one row too many for two processes
UNEVEN = [*EVEN, 10]
LAUNCH = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]


def prepared(folder, kind, precision="fp32", optimizer="sgd", dropout=0.0, stop="go", lengths=EVEN):
    """The script's path and arguments, and its environment."""
    script = folder.parent / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    options = [script, folder, kind, precision, optimizer, 4 if kind == "one" else 2, dropout, stop, lengths]
    return [str(option) for option in options], environment


def train(folder, kind, **options):
    """The numbers of every process, and the trained parameters that the last checkpoint holds."""
    script, environment = prepared(folder, kind, **options)
    processes = 1 if kind == "one" else 2
    command = [sys.executable, *(["-m", *LAUNCH] if processes == 2 else []), *script]
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    numbers = [json.loads(path.read_text()) for path in sorted(folder.glob("numbers-*.json"))]
    assert [found["processes"] for found in numbers] == [processes] * processes
    saved = load_file(folder / numbers[0]["checkpoint"] / TENSORS_FILE)
    return numbers, {name: value for name, value in saved.items() if name.startswith("/parameters/")}


def bereaved(folder, kind, patience=60, **options):
    """Errors of process 0, after 1 was killed in step 2; no launcher is there to end it. `patience` in seconds."""
    script, environment = prepared(folder, kind, stop="kill", **options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    survivor, killed = (
        subprocess.Popen(
            [sys.executable, *script],
            env=environment | address | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=(folder.parent / f"errors-{rank}.txt").open("w"),
        )
        for rank in "01"
    )
    try:
        assert killed.wait(300) == -signal.SIGKILL, (folder.parent / "errors-1.txt").read_text()[-4000:]
        assert survivor.wait(patience) == 1
    finally:
        survivor.kill()
        survivor.wait()
        killed.kill()
        killed.wait()
    return (folder.parent / "errors-0.txt").read_text()


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    numbers, parameters = train(tmp_path_factory.mktemp("one") / "run", "one", lengths=UNEVEN)
    return numbers[0], parameters


@pytest.mark.parametrize("kind", ["copied", "sharded", "stream"])
def test_two_processes_train_as_one_does(one_process, tmp_path, kind):
    """The last row of an epoch is one process's; what the other gets in its place does not count."""
    expected, expected_parameters = one_process
    assert expected["tokens"] == [57, 9] * 2
    numbers, parameters = train(tmp_path / "run", kind, lengths=UNEVEN)
    for found in numbers:
        assert found["tokens"] == expected["tokens"]
        for name in ("losses", "norms", "evaluations"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    assert parameters.keys() == expected_parameters.keys() and len(parameters) > 20
    for name, value in expected_parameters.items():
        assert (parameters[name] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["copied", "sharded"])
def test_sigterm_to_one_process_stops_both_and_they_go_on_bit_for_bit(tmp_path, kind):
    options = {"precision": "bf16", "optimizer": "adamw", "dropout": 0.3}
    numbers, parameters = train(tmp_path / "whole", kind, **options)
    assert len(numbers[0]["losses"]) == 2
    stopped, _ = train(tmp_path / "run", kind, stop="stop", **options)
    for found in stopped:
        assert (found["ending"], found["checkpoint"], len(found["losses"])) == ("terminated", "checkpoint-1", 1)
    resumed_numbers, resumed_parameters = train(tmp_path / "run", kind, **options)
    assert resumed_numbers == numbers
    assert resumed_parameters.keys() == parameters.keys()
    for name, value in parameters.items():
        assert resumed_parameters[name].equal(value), name
