"""Adapter files: exact round trips, and damage, strangers and failures that are noticed before they do harm."""

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hylorada import HyLoRADAConfig, HyLoRADAModel, storage
from hylorada.lora import adapted_layers

RECORD, TENSORS = storage.RECORD_FILE, storage.TENSORS_FILE


@pytest.fixture
def saved(make_model, token_ids, tmp_path):
    """A saved adapter of a tiny Llama: its folder and the logits of its model."""
    model = make_model("llama", lora_target_modules=("q_proj", "v_proj"))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(token_ids).logits


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_comes_back_is_the_same_to_the_last_bit(make_base, make_model, token_ids, family, dtype, tmp_path):
    model = make_model(family, dtype)
    model.save_pretrained(tmp_path / "once")
    assert set(contents(tmp_path / "once")) == {RECORD, TENSORS}
    loaded = HyLoRADAModel.from_pretrained(make_base(family, dtype), tmp_path / "once")
    assert loaded.hylorada_config == model.hylorada_config
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)
    assert all(parameter.requires_grad for parameter in loaded.adapter_parameters().values())
    loaded.save_pretrained(tmp_path / "twice")
    assert contents(tmp_path / "twice") == contents(tmp_path / "once")


@pytest.mark.parametrize(
    "fields", [{"use_blend": False}, {"use_dora_magnitude": False}, {"position_bias_enabled": False}]
)
def test_every_variant_round_trips(make_base, make_model, token_ids, tmp_path, fields):
    model = make_model("gpt2", **fields)
    model.save_pretrained(tmp_path)
    loaded = HyLoRADAModel.from_pretrained(make_base("gpt2"), tmp_path)
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def test_keys_are_the_linears_names(saved):
    tensors = load_file(saved[0] / TENSORS)
    layer = "model.layers.1.self_attn.v_proj"
    assert {name for name in tensors if name.startswith(layer)} == {
        f"{layer}.{name}" for name in ("lora_a", "lora_b", "magnitude", "residual_weight")
    }
    assert {name: tuple(tensors[name].shape) for name in tensors if "position" in name} == {
        "position_bias.table": (64,),
        "position_bias.weight": (1,),
    }


def test_a_parameter_keeps_the_dtype_that_it_was_saved_in(make_base, make_model, token_ids, tmp_path):
    model = make_model("llama", torch.bfloat16).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = HyLoRADAModel.from_pretrained(make_base("llama", torch.bfloat16), tmp_path)
    assert {parameter.dtype for parameter in loaded.adapter_parameters().values()} == {torch.bfloat16}
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def test_an_unmerged_model_saves_its_adapter(make_base, make_model, token_ids, tmp_path):
    model = make_model("llama")
    expected = model(token_ids).logits
    model.merge_lora_weights()
    model.unmerge_lora_weights()
    model.save_pretrained(tmp_path)
    loaded = HyLoRADAModel.from_pretrained(make_base("llama"), tmp_path)
    assert torch.equal(loaded(token_ids).logits, expected)


def test_a_model_in_another_precision_is_the_same_base(make_base, saved, token_ids):
    loaded = HyLoRADAModel.from_pretrained(make_base("llama", torch.bfloat16), saved[0])
    assert (loaded(token_ids).logits.float() - saved[1]).abs().max() < 0.03 * saved[1].abs().max()


@pytest.mark.parametrize("source", ["none", "name", "other base"])
@pytest.mark.parametrize("position", [True, False])
def test_a_merged_model_comes_back_whole(make_base, make_model, token_ids, family, tmp_path, source, position):
    model = make_model(family, position_bias_enabled=position)
    model.merge_lora_weights()
    model.save_pretrained(tmp_path)
    expected = model(token_ids).logits
    base = {"none": None, "name": str(tmp_path), "other base": make_base(family)}[source]
    loaded = HyLoRADAModel.from_pretrained(base, tmp_path)
    assert loaded.merged and not adapted_layers(loaded)
    assert torch.equal(loaded(token_ids).logits, expected)
    assert loaded.count_params()["trainable"] == (65 if position else 0)
    with pytest.raises(RuntimeError, match="loaded from the folder of a merged model"):
        loaded.unmerge_lora_weights()
    if not position:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(plain(token_ids).logits, expected)


def test_no_base_model_takes_the_one_that_the_adapter_names(make_base, token_ids, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    model = HyLoRADAModel(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), HyLoRADAConfig())
    model.save_pretrained(tmp_path / "adapter")
    for base in (None, tmp_path / "base"):
        loaded = HyLoRADAModel.from_pretrained(base, tmp_path / "adapter")
        assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def test_an_adapter_without_a_named_base_asks_for_one(saved):
    with pytest.raises(ValueError, match="does not name its base model; pass base_model"):
        HyLoRADAModel.from_pretrained(None, saved[0])


def test_every_damaged_byte_is_noticed(make_base, saved):
    folder, _ = saved
    base = make_base("llama")
    modules = list(base.modules())
    for name in (RECORD, TENSORS):
        whole = (folder / name).read_bytes()
        for place in range(0, len(whole), len(whole) // 40):
            (folder / name).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            with pytest.raises(ValueError, match=f"{name}.*(damaged|format)"):
                HyLoRADAModel.from_pretrained(base, folder)
        for length in (0, 1, 8, len(whole) // 2, len(whole) - 2):
            (folder / name).write_bytes(whole[:length])
            with pytest.raises(ValueError, match=f"{name}.*(damaged|format)"):
                HyLoRADAModel.from_pretrained(base, folder)
        (folder / name).write_bytes(whole)
    assert list(base.modules()) == modules
    HyLoRADAModel.from_pretrained(base, folder)


def rewrite(folder, change=lambda record: None, tensors=None):
    """Change a record and make its checksums right again."""
    record = json.loads((folder / RECORD).read_text())
    if tensors is not None:
        save_file(tensors, folder / TENSORS)
    data = (folder / TENSORS).read_bytes()
    record["tensors_sha256"] = storage.hashlib.sha256(data).hexdigest()
    change(record)
    record.pop("checksum", None)
    record["checksum"] = storage.record_checksum(record)
    (folder / RECORD).write_text(json.dumps(record))


def test_a_newer_format_is_refused(make_base, saved):
    rewrite(saved[0], lambda record: record.update(format_version=99))
    with pytest.raises(ValueError, match="format version 99, this hylorada reads up to 1; install a newer"):
        HyLoRADAModel.from_pretrained(make_base("llama"), saved[0])


def test_foreign_folders_are_named_for_what_they_are(make_base, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"holds no HyLoRADA adapter: there is no {RECORD}"):
        HyLoRADAModel.from_pretrained(make_base(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="PEFT adapter"):
        HyLoRADAModel.from_pretrained(make_base(), tmp_path)
    for text in ("[]", '{"lora_rank": 8}', "null"):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(ValueError, match="not the record of a HyLoRADA adapter"):
            HyLoRADAModel.from_pretrained(make_base(), tmp_path)


def test_a_missing_tensor_file_is_named(make_base, saved):
    (saved[0] / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {TENSORS}"):
        HyLoRADAModel.from_pretrained(make_base("llama"), saved[0])


def test_something_else_than_safetensors_is_a_value_error(make_base, saved):
    (saved[0] / TENSORS).write_bytes(b"not tensors at all")
    rewrite(saved[0])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        HyLoRADAModel.from_pretrained(make_base("llama"), saved[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("position_bias.table"), "lacks position_bias.table"),
        (lambda tensors: tensors.update(extra=torch.ones(2)), "nothing takes extra"),
        (lambda tensors: tensors.update({"position_bias.table": torch.ones(63)}), r"position_bias.table is \(63,\)"),
        (lambda tensors: tensors.update({"position_bias.weight": torch.ones(1).long()}), "torch.int64"),
    ],
)
def test_tensors_that_do_not_fit_the_config_change_nothing(make_base, saved, token_ids, change, message):
    tensors = load_file(saved[0] / TENSORS)
    change(tensors)
    rewrite(saved[0], tensors=tensors)
    base = make_base("llama")
    modules = list(base.modules())
    with pytest.raises(ValueError, match=message):
        HyLoRADAModel.from_pretrained(base, saved[0])
    assert list(base.modules()) == modules and all(parameter.requires_grad for parameter in base.parameters())


def test_a_config_of_another_version_is_refused(make_base, saved):
    rewrite(saved[0], lambda record: record["config"].update(lora_flavour="new"))
    with pytest.raises(ValueError, match="no field 'lora_flavour'"):
        HyLoRADAModel.from_pretrained(make_base("llama"), saved[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "wrong base model: the adapter's has no model.layers.2"),
        ({"num_hidden_layers": 1}, "wrong base model: it has no model.layers.1"),
        ({"vocab_size": 98}, r"embed_tokens.weight has shape \(98, 32\), the adapter's has \(97, 32\)"),
    ],
)
def test_a_base_of_another_shape_is_refused(make_base, saved, changes, message):
    base = make_base("llama", **changes)
    modules = list(base.modules())
    with pytest.raises(ValueError, match=message):
        HyLoRADAModel.from_pretrained(base, saved[0])
    assert list(base.modules()) == modules


def test_a_base_with_other_weights_is_refused_unless_told_otherwise(make_base, saved):
    base = make_base("llama")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    HyLoRADAModel.from_pretrained(base, saved[0])

    base = make_base("llama")
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight.mul_(1.05)
    with pytest.raises(ValueError, match=r"rows of model.layers.0.self_attn.q_proj.weight .* 5.0% .*strict_base=False"):
        HyLoRADAModel.from_pretrained(base, saved[0])
    HyLoRADAModel.from_pretrained(base, saved[0], strict_base=False)


def test_an_adapted_base_is_refused(make_model, saved):
    model = make_model("llama")
    for base in (model, model.base_model):
        with pytest.raises(ValueError, match="is adapted already"):
            HyLoRADAModel.from_pretrained(base, saved[0])


def test_strict_base_false_still_needs_tensors_that_fit(make_base, saved):
    with pytest.raises(ValueError, match=r"lacks model\.layers\.2"):
        HyLoRADAModel.from_pretrained(make_base("llama", num_hidden_layers=3), saved[0], strict_base=False)


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("step", ["write", "sync", "first rename", "second rename"])
def test_a_failed_save_leaves_the_old_files(make_model, tmp_path, monkeypatch, step, merged):
    folder = tmp_path / "adapter"
    make_model("llama", position_bias_enabled=False).save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    model = make_model("llama")
    if merged:
        model.merge_lora_weights()

    replace, calls = os.replace, []

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == {"first rename": 1, "second rename": 2}.get(step):
            full_disk()
        return replace(source, target)

    monkeypatch.setattr(storage.os, "replace", fail_once)
    if step == "write":
        monkeypatch.setattr(Path, "write_text", full_disk)
    if step == "sync":
        monkeypatch.setattr(storage.os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"cannot save to .*No space left on device.*what was there before is unchanged"):
        model.save_pretrained(folder)
    assert contents(folder) == before

    monkeypatch.undo()
    model.save_pretrained(folder)
    assert contents(folder).keys() >= {RECORD, TENSORS, "notes.txt"}
    assert storage.read_adapter(folder).merged is merged


def test_a_failed_first_save_leaves_no_folder(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_model("llama").save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_path_that_cannot_be_a_folder_is_an_os_error(make_model, tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="cannot save to"):
            make_model("llama").save_pretrained(path)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="no folder is unwritable for root")
def test_an_unwritable_folder_is_an_os_error(make_model, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot save to .*Permission denied"):
        make_model("llama").save_pretrained(tmp_path)


def test_a_new_full_model_replaces_the_shards_of_an_old_one(make_model, token_ids, tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "optimizer.pt"):
        (tmp_path / name).write_bytes(b"old")
    model = make_model("llama")
    model.merge_lora_weights()
    model.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == {
        *(RECORD, TENSORS, "optimizer.pt", "config.json", "generation_config.json", "model.safetensors")
    }
    loaded = HyLoRADAModel.from_pretrained(None, tmp_path)
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def test_an_unmerged_save_takes_the_merged_model_away(make_base, make_model, token_ids, tmp_path):
    model = make_model("llama")
    expected = model(token_ids).logits
    model.merge_lora_weights()
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    model.unmerge_lora_weights()
    model.save_pretrained(tmp_path)
    assert set(contents(tmp_path)) == {RECORD, TENSORS, "notes.txt"}
    loaded = HyLoRADAModel.from_pretrained(make_base("llama"), tmp_path)
    assert torch.equal(loaded(token_ids).logits, expected)


def test_a_base_beside_its_adapter_stays(make_base, make_model, tmp_path):
    make_base("llama").save_pretrained(tmp_path)
    base = contents(tmp_path)
    model = make_model("llama")
    for _ in range(2):
        model.save_pretrained(tmp_path)
        assert contents(tmp_path).items() >= base.items()


def test_a_merged_model_that_is_adapted_anew_stays_beside_its_adapter(make_model, token_ids, tmp_path):
    merged = make_model("llama", position_bias_enabled=False)
    merged.merge_lora_weights()
    merged.save_pretrained(tmp_path)
    model = HyLoRADAModel(AutoModelForCausalLM.from_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    loaded = HyLoRADAModel.from_pretrained(None, tmp_path)
    assert not loaded.merged and torch.equal(loaded(token_ids).logits, model(token_ids).logits)


@pytest.mark.parametrize("strict_base", [True, False])
@pytest.mark.parametrize("other", [("gpt2", {}), ("llama", {"num_hidden_layers": 1}), ("llama", {"vocab_size": 98})])
def test_a_base_that_does_not_fit_a_merged_model_is_told_what_does(
    make_base, make_model, token_ids, tmp_path, other, strict_base
):
    model = make_model("llama")
    model.merge_lora_weights()
    model.save_pretrained(tmp_path)
    family, changes = other
    with pytest.raises(
        ValueError, match=r"wrong base model.*; pass base_model=None, or a base of the same arch"
    ) as info:
        HyLoRADAModel.from_pretrained(make_base(family, **changes), tmp_path, strict_base=strict_base)
    assert "strict_base" not in str(info.value)
    loaded = HyLoRADAModel.from_pretrained(None, tmp_path, strict_base=strict_base)
    assert torch.equal(loaded(token_ids).logits, model(token_ids).logits)


def test_an_empty_matrix_has_no_norms():
    parameters = {"empty": torch.zeros(0, 3), "narrow": torch.zeros(3, 0), "full": torch.tensor([[3.0, 4.0]])}
    saved = storage.fingerprint(parameters)
    assert saved["row_norms"] == {"full": [5.0]}
    assert saved["shapes"] == {"empty": [0, 3], "narrow": [3, 0], "full": [1, 2]}
    storage.check_base(saved, parameters)
    storage.check_base(saved | {"row_norms": {"empty": []}}, parameters)
    with pytest.raises(ValueError, match=r"empty has shape \(1, 3\)"):
        storage.check_base(saved, parameters | {"empty": torch.zeros(1, 3)})


def test_a_damaged_full_model_is_a_value_error(make_model, tmp_path):
    model = make_model("llama")
    model.merge_lora_weights()
    model.save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"merged model in .* is damaged"):
        HyLoRADAModel.from_pretrained(None, tmp_path)


def test_full_weights_that_do_not_belong_to_the_record_are_noticed(make_base, make_model, tmp_path):
    model = make_model("llama")
    model.merge_lora_weights()
    model.save_pretrained(tmp_path)
    make_base("llama", num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"wrong base model.*the full model beside the adapter is not the one"):
        HyLoRADAModel.from_pretrained(None, tmp_path)


def test_trainable_parameters_outside_of_the_adapter_are_named(make_model, tmp_path, caplog):
    model = make_model("llama")
    model.base_model.lm_head.requires_grad_(True)
    with caplog.at_level(logging.WARNING, logger="hylorada"):
        model.save_pretrained(tmp_path)
    assert "base_model.lm_head.weight" in caplog.text


def test_a_moved_folder_is_a_whole_adapter(make_base, saved, token_ids, tmp_path):
    shutil.move(saved[0], tmp_path / "elsewhere")
    loaded = HyLoRADAModel.from_pretrained(make_base("llama"), tmp_path / "elsewhere")
    assert torch.equal(loaded(token_ids).logits, saved[1])
