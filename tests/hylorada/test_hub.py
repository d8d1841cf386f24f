"""Model cards say what is in a folder, and an upload hands a hub the whole folder."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest

from hylorada import HyLoRADAModel
from hylorada.hub import CARD_FILE, upload, write_card
from hylorada.integrations.peft_files import export_adapter, export_lora
from tests.hylorada.conftest import disturb

PLAIN = {"position_bias_enabled": False, "use_blend": False, "use_dora_magnitude": False}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that keeps what it is given in a folder; `calls` holds the arguments."""
    calls, folder = [], tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            calls.append(("login", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message, revision):
            calls.append(("upload", repo_id, commit_message, revision))
            shutil.copytree(folder_path, folder)
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return SimpleNamespace(calls=calls, folder=folder)


@pytest.mark.parametrize("merged", [False, True])
def test_what_is_pushed_is_the_model(make_base, make_model, token_ids, hub, merged):
    model = make_model()
    expected = model(token_ids).logits
    if merged:
        model.merge_lora_weights()
        expected = model(token_ids).logits
    address = model.push_to_hub("thing", private=True, token="t", revision="next", commit_message="Mine")
    assert address == "https://hub/commit/1"
    assert hub.calls == [("login", "t"), ("create", "thing", True, True), ("upload", "me/thing", "Mine", "next")]
    loaded = HyLoRADAModel.from_pretrained(None if merged else make_base(), hub.folder).eval()
    assert (loaded(token_ids).logits - expected).abs().max() == 0
    card = (hub.folder / CARD_FILE).read_text()
    assert ("HyLoRADA model, merged" in card) == merged and 'snapshot_download("thing")' in card


def test_a_hub_out_of_reach_is_a_clear_error(make_model, monkeypatch):
    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, *arguments, **options):
            raise ConnectionRefusedError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(OSError, match=r"cannot upload to 'me/thing': ConnectionRefusedError: no route; log in"):
        make_model().push_to_hub("me/thing")


@pytest.mark.parametrize("name", ["", "a/b/c", "with space", "../up", 3])
def test_names_that_no_repository_has_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="repo_id must be"):
        upload(tmp_path, name)


def test_the_card_of_an_export_names_base_method_rank_and_parameters(make_model, tmp_path):
    model = make_model(lora_rank=3)
    model.config._name_or_path = "owner/base"
    export_adapter(model, tmp_path)
    card = (tmp_path / CARD_FILE).read_text()
    trained = sum(parameter.numel() for parameter in model.adapter_parameters().values())
    assert card.startswith('---\nbase_model: "owner/base"\nlibrary_name: peft\n')
    for text in (
        "# DoRA adapter",
        "| Base model | `owner/base` |",
        "| Rank | 3 |",
        f"| Adapter's parameters | {trained} |",
        "| Method | lora, dora, blend, position_bias |",
        'AutoModelForCausalLM.from_pretrained("owner/base")',
        "PEFT computes it without the position bias.",
    ):
        assert text in card
    assert "license" not in card.partition("\n---\n")[0]


def test_the_card_of_a_lora_export_has_its_error(make_model, tmp_path):
    error = export_lora(make_model(), tmp_path, 2)
    assert f"| Relative error of the updates | {error:.2e} |" in (tmp_path / CARD_FILE).read_text()


def test_a_path_is_no_base_model_of_a_hub(make_model, tmp_path):
    model = make_model()
    model.config._name_or_path = str(tmp_path)
    export_adapter(model, tmp_path)
    assert "base_model:" not in (tmp_path / CARD_FILE).read_text().partition("\n---\n")[0]


def test_a_card_that_somebody_wrote_stays(make_model, tmp_path):
    model = make_model(**PLAIN)
    (tmp_path / CARD_FILE).write_text("mine")
    export_adapter(model, tmp_path)
    assert (tmp_path / CARD_FILE).read_text() == "mine"


def test_a_generated_card_is_replaced(make_model, tmp_path):
    export_adapter(make_model(lora_rank=2), tmp_path)
    export_adapter(disturb(make_model(lora_rank=5)), tmp_path)
    assert "| Rank | 5 |" in (tmp_path / CARD_FILE).read_text()


def test_cards_quote_what_yaml_would_misread(tmp_path):
    write_card(tmp_path, kind="thing", base_model="1e3", facts={}, load="pass", library="peft")
    assert 'base_model: "1e3"' in (tmp_path / CARD_FILE).read_text()
