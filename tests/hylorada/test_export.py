"""A merged export: the files are the model, and the report is what a merge changed."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from hylorada import HyLoRADAModel
from hylorada.evaluation import evaluate_perplexity
from hylorada.export import REPORT_FILE, export_merged
from hylorada.hub import CARD_FILE
from hylorada_kernels.testing import relative_error

NO_RUNTIME = {"position_bias_enabled": False}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, 97, (length,), generator=generator)} for length in (40, 9, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_export_is_the_model_in_transformers(make_model, token_ids, rows, family, dtype, tmp_path):
    model = make_model(family, **NO_RUNTIME)
    with torch.no_grad():
        expected = model(token_ids).logits
    report = export_merged(model, tmp_path, rows, dtype=dtype, max_length=16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert loaded.dtype == dtype
    with torch.no_grad():
        error = relative_error(loaded(token_ids).logits, expected.double())
    assert error <= (2e-6 if dtype == torch.float32 else 0.1)
    assert [parity.dtype for parity in report] == ["float32", "bfloat16"][: 1 + (dtype == torch.bfloat16)]
    assert report[0].logits_relative_difference <= 2e-6 and report[0].argmax_agreement == 1
    # the model itself is as it was
    assert not model.merged and torch.equal(model(token_ids).logits, expected)


@pytest.mark.parametrize("trained", [{"train_norms": True}, {"train_embeddings": "tokens"}], ids=str)
def test_trained_parameters_of_the_base_take_the_dtype_too(make_model, token_ids, rows, trained, tmp_path):
    model = make_model(**NO_RUNTIME, **trained)
    report = export_merged(model, tmp_path, rows, dtype=torch.bfloat16, max_length=16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert report[0].logits_relative_difference <= 2e-6
    with torch.no_grad():
        assert relative_error(loaded(token_ids).logits, model(token_ids).logits.double()) <= 0.1


def test_the_report_says_what_differs(make_model, rows, tmp_path):
    """Counted here once more, on the model that was saved."""
    model = make_model(**NO_RUNTIME)
    parity = export_merged(model, tmp_path, rows, dtype=torch.bfloat16, max_length=16)[1]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    for name, parameter in model.named_parameters():
        if name.removeprefix("base_model.") not in model.adapter_parameters():
            parameter.data = parameter.data.bfloat16()
    differences, agreeing, tokens = [], 0, 0
    with torch.no_grad():
        for row in rows[:2]:
            for start in range(0, len(row["input_ids"]), 16):
                ids = row["input_ids"][None, start : start + 16]
                ours, theirs = model(ids).logits[0].float(), merged(ids).logits[0].float()
                differences.append((ours - theirs).abs().max().item())
                agreeing += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
                tokens += ids.shape[1]
    assert parity.tokens == tokens == 49
    assert parity.logits_max_difference == pytest.approx(max(differences)) and max(differences) > 1e-4
    assert parity.argmax_agreement == agreeing / tokens
    for found, of in ((parity.adapted_perplexity, model), (parity.merged_perplexity, merged)):
        assert found == pytest.approx(evaluate_perplexity(of, rows, max_length=16)[0], rel=1e-4)


def test_runtime_parts_stay_and_are_named(make_model, token_ids, rows, tmp_path):
    model = make_model()
    report = export_merged(model, tmp_path, rows, max_length=16)
    assert report[0].logits_relative_difference <= 2e-6
    loaded = HyLoRADAModel.from_pretrained(None, tmp_path).eval()
    with torch.no_grad():
        assert relative_error(loaded(token_ids).logits, model(token_ids).logits.double()) <= 2e-6
    card = (tmp_path / CARD_FILE).read_text()
    assert "transformers computes it without the position bias" in card
    assert f"perplexity {report[0].merged_perplexity:.3f} beside {report[0].adapted_perplexity:.3f}" in card


def test_the_report_is_saved(make_model, rows, tmp_path):
    report = export_merged(make_model(**NO_RUNTIME), tmp_path, rows, max_length=16)
    saved = json.loads((tmp_path / REPORT_FILE).read_text())
    assert saved == [vars(parity) for parity in report]
    assert all(math.isfinite(value) for value in saved[0].values() if not isinstance(value, str))


def test_texts_need_a_tokenizer_which_is_saved(make_model, tokenizer, tmp_path):
    model = make_model(**NO_RUNTIME)
    with pytest.raises(ValueError, match="pass tokenizer"):
        export_merged(model, tmp_path / "none", ["abc"])
    report = export_merged(model, tmp_path / "a", ["abc", {"text": "defg"}], tokenizer)
    assert report[0].tokens == 7 and (tmp_path / "a" / "tokenizer.json").is_file()


def test_what_cannot_be_exported_is_refused(make_base, make_model, rows, tmp_path):
    folder = tmp_path / "new"
    with pytest.raises(TypeError, match="must be a HyLoRADAModel, got LlamaForCausalLM"):
        export_merged(make_base(), folder, rows)
    with pytest.raises(TypeError, match=r"floating point torch.dtype, got torch.int8"):
        export_merged(make_model(), folder, rows, dtype=torch.int8)
    with pytest.raises(ValueError, match="no token to predict"):
        export_merged(make_model(), folder, [{"input_ids": [5]}])
    with pytest.raises(RuntimeError, match="low-rank update by position"):
        export_merged(make_model(position_bias_target="delta"), folder, rows)
    model = make_model()
    model.merge_lora_weights()
    with pytest.raises(RuntimeError, match="merged: call unmerge_lora_weights"):
        export_merged(model, folder, rows)
    assert not folder.exists()
