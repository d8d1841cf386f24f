"""The benchmark of retrieval by depth: its lists, its report, and the small model that must beat chance."""

import json
import re

import pytest

from benchmarks import run_lost_in_the_middle as benchmark
from benchmarks.run_lost_in_the_middle import LENGTHS, TASK, Lists, main, make_tokenizer


def test_only_values_that_were_listed_are_learned():
    tokenizer = make_tokenizer()
    rows = Lists(tokenizer, steps=9, batch_size=4, seed=0)
    lengths = []
    for row in rows:
        pairs = len(row["input_ids"]) // 4
        words = tokenizer.convert_ids_to_tokens(row["input_ids"])
        listed = dict(zip(words[: 2 * pairs : 2], words[1 : 2 * pairs : 2], strict=True))
        asked = list(zip(words[2 * pairs :: 2], words[2 * pairs + 1 :: 2], strict=True))
        assert dict(asked) == listed and len(asked) == pairs
        learned = [label for label in row["labels"] if label != -100]
        assert tokenizer.convert_ids_to_tokens(learned) == [value for _, value in asked]
        assert row["labels"][2 * pairs + 1 :: 2] == learned
        lengths.append(pairs)
    # a batch has one length, and the longest lists come last
    assert [len(set(lengths[i : i + 4])) for i in range(0, 36, 4)] == [1] * 9
    assert lengths[0] == LENGTHS[0] and all(length in LENGTHS[: 1 + i // 4] for i, length in enumerate(lengths))
    assert rows[5] == Lists(tokenizer, 9, 4, 0)[5] != Lists(tokenizer, 9, 4, 1)[5]


def test_questions_are_tokenized_like_the_lists():
    tokenizer = make_tokenizer()
    pairs = [("k03", "v07"), ("k05", "v01")]
    prompt = tokenizer(TASK.prompt(pairs, 0), add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(prompt) == ["k03", "v07", "k05", "v01", "k03"]
    assert tokenizer.decode(tokenizer.convert_tokens_to_ids(["v01", "v02"])) == "v01 v02"


def results(directory, name):
    paths = [directory / f"lost_in_the_middle_{name}{suffix}" for suffix in (".json", ".md", ".png")]
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    return json.loads(paths[0].read_text()), paths[1].read_text()


def test_control_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    options = ["--steps", "2", "--batch_size", "4", "--num_samples", "2", "--num_depths", "3"]
    assert main(["control", *options, "--results", str(tmp_path)]) == 0
    found, text = results(tmp_path, "control")
    assert len(found["trained"]["candidate_accuracy"]["mean"]) == 3
    assert found["untrained"]["num_pairs"] == 32 and found["trained"]["tokens"] == 70
    assert f"commit {found['commit']}; seed 0" in text and "| chance | 0.031 | 0.031 | 0.031 | | |" in re.sub(
        " +", " ", text
    )
    assert capsys.readouterr().out.strip() == text.strip()


def test_model_is_measured_on_held_out_documents(tmp_path, monkeypatch, make_base, tokenizer):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Text {i}. " + "It was the best of times. " * 60)
    base = make_base(max_position_embeddings=1024)
    monkeypatch.setattr(benchmark, "load_pretrained", lambda name, dtype: (base, tokenizer))
    options = ["--num_samples", "1", "--num_depths", "3", "--max_length", "600", "--num_blocks", "2", "--generate"]
    arguments = ["model", "--model", "a/tiny", "--dataset", str(tmp_path), *options]
    assert main([*arguments, "--results", str(tmp_path / "results")]) == 0
    found, text = results(tmp_path / "results", "tiny")
    assert found["held_out_documents"] == 1 and found["blocks"] == 2
    assert len(found["evidence"]["nll"]["mean"]) == 3
    for name in ("no evidence", "oracle", "key-value", "perplexity"):
        assert re.search(rf"^\| {name} +\|", text, re.MULTILINE)


def test_what_cannot_run_says_so(capsys):
    assert main(["model", "--dataset", "nowhere"]) == 2
    assert "unknown dataset 'nowhere'" in capsys.readouterr().err


@pytest.mark.slow
def test_trained_control_beats_chance_at_every_depth_and_untrained_does_not(tmp_path):
    assert main(["control", "--num_samples", "40", "--results", str(tmp_path)]) == 0
    found, _ = results(tmp_path, "control")
    chance = found["trained"]["chance"]
    for quantity in ("candidate_accuracy", "best_subspan_em"):
        assert all(low > 10 * chance for low, _ in found["trained"][quantity]["interval"])
    assert all(low <= chance for low, _ in found["untrained"]["candidate_accuracy"]["interval"])
    # five words, each at best one of the 64 values
    assert all(low <= 5 / 64 for low, _ in found["untrained"]["best_subspan_em"]["interval"])
