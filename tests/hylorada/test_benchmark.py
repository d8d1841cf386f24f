"""Comparisons and ablations in small: a tiny model, local texts, every method, every file."""

import json
from datetime import datetime

import pytest
from transformers import AutoConfig

from benchmarks import run_benchmark
from hylorada.comparison import run_arm
from hylorada.report import comparison_table, difference_table

METHODS = ["baseline", "lora", "rslora", "dora", "lorada", "hylorada"]


@pytest.fixture
def saved_model(make_base, tokenizer, tmp_path):
    directory = tmp_path / "model"
    make_base().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def texts(tmp_path):
    """Ten documents whose lengths differ and whose words repeat: there is something to learn."""
    directory = tmp_path / "texts"
    directory.mkdir()
    for i in range(10):
        (directory / f"{i}.txt").write_text("and the word was good; " * (5 + i) + chr(ord("a") + i))
    return directory


@pytest.fixture
def run(saved_model, texts, tmp_path, monkeypatch):
    """run(*arguments) -> (exit code, rows of results.json); every method in this process: starting one is slow."""
    monkeypatch.setattr(run_benchmark, "_run", run_arm)

    def run(*arguments, main=run_benchmark.main):
        known = set((tmp_path / "results").glob("*"))
        shared = ["--model", saved_model, "--dataset", texts, "--output_dir", tmp_path / "results"]
        small = ["--max_length", 32, "--steps", 6, "--batch_size", 2, "--lr", 1e-2, "--num_test", 8]
        code = main([str(argument) for argument in (*shared, *small, *arguments)])
        new = set((tmp_path / "results").glob("*")) - known
        return code, json.loads((new.pop() / "results.json").read_text())["rows"] if new else []

    return run


def test_methods_are_compared_on_equal_terms(run, tmp_path, capsys):
    code, rows = run("--methods", *METHODS, "--lora_dropout", 0.1)
    assert code == 0 and [row["method"] for row in rows] == METHODS
    baseline, *adapted = rows

    # all start as the same model
    assert all(row["perplexity_before"] == pytest.approx(baseline["perplexity_before"], rel=1e-5) for row in adapted)
    assert baseline["perplexity_after"] == baseline["perplexity_before"]
    # all learn
    assert all(row["perplexity_after"] < 0.9 * baseline["perplexity_after"] for row in adapted)
    # all see the same batches; their first losses, taken under different dropout, are not needed to be equal
    tokens = [row["steps"]["tokens"] for row in adapted]
    assert len(tokens[0]) == 6 and all(order == tokens[0] for order in tokens)

    # q, k, v, o of 2 layers with 32 features: R (I + O) each, O magnitudes, 1 blend, and 65 for the positions;
    # a temperature and 32 distances for each of 4 heads in 2 layers
    low_rank = 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16))
    magnitudes = 2 * (32 + 32 + 16 + 16)
    counts = [row["trainable_parameters"] for row in rows]
    dora = low_rank + magnitudes
    assert counts == [0, low_rank, low_rank, dora, low_rank + 2 * 4 * 33, dora + 8 + 65]

    directory = next((tmp_path / "results").iterdir())
    pictures = ["differences.png", "loss.png", "perplexity.png"]
    assert sorted(path.name for path in directory.iterdir()) == [*pictures, "report.html", "report.md", "results.json"]
    printed = capsys.readouterr().out
    for table in (comparison_table(rows), difference_table(rows)):
        assert table in printed and table in (directory / "report.md").read_text()


def test_embeddings_and_norms_train_at_scaled_positions(run, saved_model):
    rope = ("--rope_scaling_type", "linear", "--rope_scaling_factor", 4)
    code, (base, row) = run("--methods", "baseline", "lora", "--train_embeddings", "--train_norms", *rope)
    assert code == 0 and row["perplexity_after"] < 0.9 * row["perplexity_before"]
    # the scaled positions are another model than the base model
    assert row["perplexity_before"] != pytest.approx(base["perplexity_before"], rel=1e-5)
    vocabulary = AutoConfig.from_pretrained(saved_model).vocab_size
    assert row["trainable_parameters"] == 2 * 8 * (2 * (32 + 32) + 2 * (32 + 16)) + 32 * vocabulary + 5 * 32


def test_methods_are_compared_in_groups(run):
    groups = ("--s2_attn", "--s2_group_size", 8, "--sink_tokens", 1)
    code, rows = run("--methods", "baseline", "lora", "lorada", "hylorada", *groups, "--steps", 12)
    assert code == 0
    baseline, *adapted = rows
    for row in adapted:
        # evaluation has full attention, and training has not
        assert row["perplexity_before"] == pytest.approx(baseline["perplexity_before"], rel=1e-5)
        assert row["perplexity_after"] < 0.9 * baseline["perplexity_after"]
        assert (row["settings"]["s2_group_size"], row["settings"]["s2_sink_tokens"]) == (8, 1)
    _, full = run("--methods", "lora", "--steps", 12)
    assert abs(full[0]["steps"]["loss"][0] - adapted[0]["steps"]["loss"][0]) > 1e-3


def test_runs_of_one_second_have_folders_of_their_own(tmp_path):
    now = datetime(2026, 1, 2, 3, 4, 5)
    made = [run_benchmark._make_directory(tmp_path / "results", now) for _ in range(3)]
    assert [path.name for path in made] == ["2026-01-02T03-04-05", "2026-01-02T03-04-05-2", "2026-01-02T03-04-05-3"]
    assert all(path.is_dir() for path in made)


def test_every_row_carries_its_circumstances(run, saved_model, texts):
    _, rows = run("--methods", "baseline", "hylorada", "--seed", 11, "--grad_accum", 2)
    for row in rows:
        assert row["model"] == str(saved_model) and row["seed"] == 11
        assert row["data"]["name"] == str(texts) and row["data"]["held-out rows"] == 8
        assert row["data"]["held-out documents"] + row["data"]["train documents"] == 10
        assert row["settings"]["lora_rank"] == 8
        assert row["settings"]["gradient_accumulation_steps"] == 2
        assert row["versions"]["torch"] and row["machine"]["cpu"] and row["command"] and "commit" in row
        assert row["peak_memory_mib"] > 50 and row["peak_memory_source"]
    assert rows[1]["seconds_per_step"] > 0
    assert [row["learning_rate"] for row in rows] == [None, 1e-2]


def test_methods_may_have_rates_of_their_own(run):
    _, rows = run(
        "--methods", "baseline", "lora", "hylorada", "--lr", "lora=4e-3", "hylorada=1e-3", "--lr_scheduler", "constant"
    )
    assert [row["learning_rate"] for row in rows] == [None, 4e-3, 1e-3]
    assert [row["steps"]["learning_rate"][-1] for row in rows[1:]] == [4e-3, 1e-3]


def test_settings_are_chosen_without_the_test_documents(saved_model, texts, tokenizer):
    arguments = ["--dataset", str(texts), "--max_length", "32"]
    seen = []
    for more in ([], ["--validation"]):
        options = run_benchmark.parse(run_benchmark._parser(), [*arguments, *more])
        documents = run_benchmark.load_documents(options.dataset)
        comparison, _ = run_benchmark._prepare(options, documents, tokenizer, {})
        train = {block["document"] for block in comparison.train_rows}
        held_out = {block["document"] for block in comparison.test_rows}
        assert not train & held_out
        seen.append((train, held_out))
    (train, test), (smaller_train, validation) = seen
    assert smaller_train | validation == train and not validation & test


def test_a_run_repeats(run, tmp_path):
    _, first = run("--methods", "hylorada", "--lora_dropout", 0.2)
    next((tmp_path / "results").iterdir()).rename(tmp_path / "first")
    _, second = run("--methods", "hylorada", "--lora_dropout", 0.2)
    assert first[0]["steps"]["loss"] == second[0]["steps"]["loss"]
    assert first[0]["perplexity_after"] == second[0]["perplexity_after"]


def test_results_survive_a_later_failure(run, tmp_path, monkeypatch):
    def failing(comparison, arm, *rest):
        if arm.name == "dora":
            raise RuntimeError("out of memory")
        return run_arm(comparison, arm, *rest)

    monkeypatch.setattr(run_benchmark, "_run", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        run("--methods", "lora", "dora")
    results = next((tmp_path / "results").glob("*/results.json"))
    assert [row["method"] for row in json.loads(results.read_text())["rows"]] == ["lora"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lora", "qlora"], "unknown method 'qlora'"),
        (["--dataset", "pg19"], "dataset 'pg19' (split 'train' of emozilla/pg19) cannot be had"),
        (["--dataset", "nowhere"], "unknown dataset 'nowhere'"),
        (["--model", "no-such/model"], "model 'no-such/model' cannot be had"),
        (["--lora_rank", "0"], "lora_rank"),
        (["--methods", "lora", "dora", "--lr", "lora=1e-3"], "method=rate for each of lora, dora; got lora=1e-3"),
        (["--lora_dropout", "1"], "lora_dropout"),
        (["--max_length", "1"], "max_length must be at least 2"),
        (["--steps", "0"], "max_steps must be at least 1"),
        (["--target_modules", "nothing_like_it"], "nothing_like_it"),
        (["--s2_attn"], "changes nothing at --max_length 32: with --s2_group_size 2048"),
        (["--s2_attn", "--s2_group_size", "auto"], "the first border of a group is after 1024 tokens"),
        (["--s2_attn", "--s2_group_size", "0"], "s2_group_size must be at least 1, got 0"),
        (["--train_embeddings", "positions"], "has no learned position table"),
        (["--rope_scaling_type", "yarn", "--rope_scaling_factor", "0.5"], "rope_scaling_factor must be at least 1"),
        (["--methods", "longlora"], "the shifted attention of longlora changes nothing at --max_length 32"),
    ],
)
def test_what_cannot_run_says_so_before_anything_does(run, capsys, tmp_path, arguments, message):
    code, rows = run(*arguments)
    assert code == 2 and not rows and not (tmp_path / "results").exists()
    assert message in capsys.readouterr().err


SEED_COMMANDS = [
    "--methods lora dora hylorada --epochs 3",
    "--methods hylorada --dataset longbench --max_length 4096",
    "--dataset longbench --max_length 4096 --methods lora hylorada --s2_attn --train_embeddings --train_norms "
    "--rope_scaling_type linear --rope_scaling_factor 4.0 --epochs 3",
    "--dataset pg19 --max_length 8192 --methods lora hylorada --s2_attn --train_embeddings --train_norms "
    "--rope_scaling_type yarn --rope_scaling_factor 8.0 --batch_size 1 --grad_accum 32 --epochs 1",
    "--model openai-community/gpt2 --methods hylorada --s2_attn --max_length 4096 --epochs 3",
    "--dataset code --model openai-community/gpt2 --methods lora hylorada --epochs 3",
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lr", "-1"], "--lr: learning_rate must be positive and finite, got -1.0"),
        (["--lr", "nan"], "--lr: learning_rate must be positive and finite, got nan"),
        (["--lr", "abc"], "--lr takes numbers, such as 2e-4 or lora=2e-4; got 'abc'"),
        (["--methods", "lora", "dora", "--lr", "lora=1e-3", "dora=0"], "--lr: learning_rate must be positive"),
        (["--methods", "lora", "--lr", "lora=x"], "--lr takes numbers, such as 2e-4 or lora=2e-4; got 'x'"),
        (["--lr_scheduler", "sawtooth"], "--lr_scheduler: lr_scheduler must be one of constant, "),
        (["--warmup_ratio", "1"], "--warmup_ratio: warmup_ratio must be in [0, 1), got 1.0"),
        (["--batch_size", "0"], "--batch_size: per_device_batch_size must be at least 1, got 0"),
        (["--methods", "baseline", "--grad_accum", "0"], "--grad_accum: gradient_accumulation_steps must be at least"),
        (["--epochs", "0"], "--epochs: num_epochs must be at least 1, got 0"),
        (["--seed", "-1"], "--seed: seed must be at least 0, got -1"),
        (["--sink_tokens", "4"], "--sink_tokens 4 needs --s2_attn"),
        (["--s2_group_size", "512"], "--s2_group_size 512 needs --s2_attn"),
        (["--rope_scaling_factor", "4"], "--rope_scaling_factor 4.0 needs --rope_scaling_type"),
        (["--original_length", "64"], "--original_length 64 needs --rope_scaling_type"),
        (["--lr", "2e-4", "--lr_grid", "1e-3", "fast"], "--lr_grid takes numbers, such as 1e-3 2e-3; got 'fast'"),
    ],
)
def test_bad_flags_are_named_before_anything_is_loaded(run, monkeypatch, capsys, arguments, message):
    def loading(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(run_benchmark, "load_documents", loading)
    monkeypatch.setattr(run_benchmark, "load_pretrained", loading)
    assert run(*arguments) == (2, [])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", SEED_COMMANDS)
def test_every_flag_of_the_documented_commands_is_known(command):
    options = run_benchmark._parser().parse_args(command.split())
    assert options.epochs in (1, 3) and options.methods
