"""What goes wrong in the world, done to real saves, loads and runs of a tiny model; each says what came of it."""

import errno
import json
import os
import re
import resource
import signal
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from hylorada import HyLoRADAConfig, HyLoRADAModel, storage
from hylorada.integrations import peft_files
from tests.hylorada.conftest import build_base, build_model
from tests.hylorada.test_trainer_processes import bereaved, train

SCENARIOS: dict[str, Callable[[Path], str]] = {}
# between any two of these a process may be killed
STEPS = [(os, ("fsync", "link", "mkdir", "rename", "replace", "unlink")), (Path, ("write_bytes", "write_text"))]


def scenario(name: str):
    def register(function):
        SCENARIOS[name] = function
        return function

    return register


def model(variant: int, merged: bool = False) -> HyLoRADAModel:
    """One of two models whose files differ."""
    made = build_model("llama", lora_target_modules=("q_proj", "v_proj"))
    with torch.no_grad():
        for parameter in made.adapter_parameters().values():
            parameter.mul_(1 + 0.1 * variant)
    if merged:
        made.merge_lora_weights()
    return made


def in_child(function: Callable[[], None]) -> int:
    """Exit code of a forked process that ran the function: 0, 1 after an error, negative after a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(step: int) -> None:
    """From now on this process kills itself in front of its `step`-th change of the disk."""
    done = 0

    def deadly(original):
        def call(*args, **kwargs):
            nonlocal done
            done += 1
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for owner, names in STEPS:
        for name in names:
            setattr(owner, name, deadly(getattr(owner, name)))


def said(function: Callable[[], object], *paths: Path) -> str:
    """The error's type and message, its paths shortened; AssertionError where there is none."""
    try:
        function()
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        message = str(error)
        for path in paths:
            message = message.replace(str(path), "DIR")
        for what in (r"\d+(?= bytes)", r"(?<=line )\d+ column \d+ \(char \d+\)"):
            message = re.sub(what, "N", message)
        return f"{type(error).__name__}: {message}"
    raise AssertionError("nothing was raised")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file; the order of a safetensors file's metadata, which changes from write to write, does not count."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name, data in found.items():
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(data[:8], "little")
            found[name] = json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
    return found


WRITES: dict[str, tuple[Callable, Callable]] = {
    "an adapter": (lambda variant, folder: model(variant).save_pretrained(folder), storage.read_adapter),
    "a merged model": (
        lambda variant, folder: model(variant, merged=True).save_pretrained(folder),
        lambda folder: HyLoRADAModel.from_pretrained(None, folder),
    ),
    "a PEFT export": (
        lambda variant, folder: peft_files.export_adapter(model(variant), folder),
        lambda folder: peft_files.import_adapter(build_base(), folder),
    ),
    "a config": (
        lambda variant, folder: HyLoRADAConfig(lora_rank=variant + 1).save(folder / "config.yaml"),
        lambda folder: HyLoRADAConfig.load(folder / "config.yaml"),
    ),
}


def _killed(what: str, folder: Path) -> str:
    write, read = WRITES[what]
    wholes = []
    for variant in (0, 1):
        whole = folder / f"whole{variant}"
        whole.mkdir()
        write(variant, whole)
        wholes.append(contents(whole))
    found = {"old": 0, "new": 0}
    for step in range(1, 200):
        target = folder / f"step{step}"
        target.mkdir()
        write(0, target)

        def save(target=target, step=step):
            killed_at(step)
            write(1, target)

        code = in_child(save)
        if code == 0:
            break
        assert code == -signal.SIGKILL, code
        read(target)
        state = {name: data for name, data in contents(target).items() if not name.startswith(".")}
        assert state in wholes, f"neither the old state nor the new one after a kill at step {step}"
        found[("old", "new")[wholes.index(state)]] += 1
        write(1, target)
        assert contents(target) == wholes[1], "the next save leaves remains"
    assert found["old"] and code == 0
    return "whole, wherever it is killed: the old one or, from the first replacement on, the new one"


for _what in WRITES:
    SCENARIOS[f"kill -9 while {_what} is saved over an old one"] = lambda folder, what=_what: _killed(what, folder)


def _full(what: str, folder: Path) -> str:
    """No file of the process that saves may grow beyond 300 bytes."""
    write, read = WRITES[what]
    write(0, folder)
    before, result = contents(folder), folder.parent / "said.txt"

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
        message = said(lambda: write(1, folder), folder)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        result.write_text(message)

    assert in_child(limited) == 0
    assert contents(folder) == before
    read(folder)
    return result.read_text()


for _what in ("an adapter", "a merged model", "a PEFT export"):
    SCENARIOS[f"no room left while {_what} is saved"] = lambda folder, what=_what: _full(what, folder)


@scenario("a read-only folder")
def read_only(folder: Path) -> str:
    model(0).save_pretrained(folder)
    before, mkdir = contents(folder), os.mkdir

    def refuse(path, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    os.mkdir = refuse
    try:
        message = said(lambda: model(1).save_pretrained(folder), folder)
    finally:
        os.mkdir = mkdir
    assert contents(folder) == before
    return message


def _damaged(change: Callable[[Path], None], folder: Path, base=build_base, read=None) -> str:
    model(0).save_pretrained(folder)
    change(folder)
    given = base()
    modules, weights = list(given.modules()), {name: w.clone() for name, w in given.named_parameters()}
    message = said(lambda: HyLoRADAModel.from_pretrained(given, folder), folder)
    assert list(given.modules()) == modules
    assert all(torch.equal(w, weights[name]) and w.requires_grad for name, w in given.named_parameters())
    return message


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _rewrite(folder: Path, **fields) -> None:
    path = folder / storage.RECORD_FILE
    record = json.loads(path.read_text()) | fields
    record.pop("checksum")
    path.write_text(json.dumps(record | {"checksum": storage.record_checksum(record)}))


SCENARIOS |= {
    "a truncated adapter": lambda f: _damaged(lambda d: _truncate(d / storage.TENSORS_FILE), f),
    "a flipped bit in the adapter": lambda f: _damaged(lambda d: _flip(d / storage.TENSORS_FILE), f),
    "a truncated record": lambda f: _damaged(lambda d: _truncate(d / storage.RECORD_FILE), f),
    "an adapter without its tensors": lambda f: _damaged(lambda d: (d / storage.TENSORS_FILE).unlink(), f),
    "a newer file version": lambda f: _damaged(lambda d: _rewrite(d, format_version=2), f),
    "a base model of another size": lambda f: _damaged(lambda d: None, f, lambda: build_base(num_hidden_layers=1)),
    "a base model with other weights": lambda f: _damaged(lambda d: None, f, _other_weights),
}


def _other_weights():
    base = build_base()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    return base


@scenario("a flipped bit in a merged model")
def flipped_merged(folder: Path) -> str:
    model(0, merged=True).save_pretrained(folder)
    _flip(folder / "model.safetensors")
    return said(lambda: HyLoRADAModel.from_pretrained(None, folder), folder)


@scenario("a flipped bit in a PEFT adapter that was exported")
def flipped_export(folder: Path) -> str:
    peft_files.export_adapter(model(0), folder)
    _flip(folder / peft_files.TENSORS_FILE)
    return said(lambda: peft_files.import_adapter(build_base(), folder), folder)


@scenario("two processes save into one folder while a third reads")
def two_writers(folder: Path) -> str:
    adapters = [model(0), model(1)]
    wholes = []
    for adapter in adapters:
        adapter.save_pretrained(folder)
        wholes.append(contents(folder))

    def save(adapter):
        for _ in range(10):
            adapter.save_pretrained(folder)

    writers = []
    for adapter in adapters:
        pid = os.fork()
        if pid == 0:
            try:
                save(adapter)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        writers.append(pid)
    codes: list[int] = []
    while len(codes) < 2:
        storage.read_adapter(folder)
        done, status = os.waitpid(-1, os.WNOHANG)
        if done in writers:
            codes.append(os.waitstatus_to_exitcode(status))
    assert codes == [0, 0], codes
    assert contents(folder) in wholes
    return "each waits for the other; every read finds one of the two, whole"


def _bereaved(kind: str, folder: Path) -> str:
    options = {"precision": "bf16", "optimizer": "adamw", "dropout": 0.3}
    (folder / "whole").mkdir()
    whole = train(folder / "whole/run", kind, **options)
    killed = folder / "killed/run"
    killed.parent.mkdir()
    errors = bereaved(killed, kind, **options)
    assert re.search(r"RuntimeError: .*(Connection (reset|closed) by peer|remote worker)", errors), errors[-4000:]
    # the folder of a checkpoint under way would be here too
    assert [path.name for path in killed.iterdir()] == ["checkpoint-1"]
    numbers, parameters = train(killed, kind, **options)
    assert len(numbers[0]["losses"]) == 2 and numbers == whole[0]
    assert parameters.keys() == whole[1].keys()
    assert all(parameters[name].equal(value) for name, value in whole[1].items())
    return (
        "the other ends within a minute with RuntimeError: ... Connection reset (or closed) by peer; the last "
        "checkpoint is whole, and the run goes on from it bit for bit"
    )


SLOW = {}
for _kind, _name in (("copied", "DDP"), ("sharded", "FSDP2")):
    SLOW[f"kill -9 of one of two processes while they train ({_name}, gloo)"] = lambda folder, kind=_kind: _bereaved(
        kind, folder
    )
SCENARIOS |= SLOW


def run(name: str) -> str:
    """The line of a scenario, done in a new folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "adapter")
        folder.mkdir()
        return SCENARIOS[name](folder)
