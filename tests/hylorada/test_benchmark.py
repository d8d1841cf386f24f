"""Comparisons and ablations in small: a tiny model, local texts, every method, every file."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest
from transformers import AutoConfig, GPT2LMHeadModel

from hylorada import ablation, benchmark, cli, comparison, flags
from hylorada.comparison import run_arm, run_in_own_process
from hylorada.config import HyLoRADAConfig
from hylorada.data import Document
from hylorada.report import comparison_table, difference_table
from hylorada.trainer import DivergedError, TrainingConfig

METHODS = ["baseline", "lora", "rslora", "dora", "lorada", "hylorada"]


def main(command, *arguments):
    """-> the exit status of the command line."""
    with pytest.raises(SystemExit) as ending:
        cli.main([command, *map(str, arguments)])
    return ending.value.code


@pytest.fixture
def run(saved_model, texts, tmp_path, monkeypatch):
    """run(*arguments) -> (exit code, rows of results.json); every method in this process: starting one is slow."""
    monkeypatch.setattr(benchmark, "_run", run_arm)

    def run(*arguments, command="benchmark"):
        known = set((tmp_path / "results").glob("*"))
        shared = ["--model", saved_model, "--dataset", texts, "--output_dir", tmp_path / "results"]
        small = ["--max_length", 32, "--steps", 6, "--batch_size", 2, "--lr", 1e-2, "--num_test", 8]
        code = main(command, *shared, *small, *arguments)
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
    # every method starts at the scaled positions, which are another model's
    assert row["perplexity_before"] == pytest.approx(base["perplexity_before"], rel=1e-5)
    _, (unscaled,) = run("--methods", "baseline")
    assert base["perplexity_before"] != pytest.approx(unscaled["perplexity_before"], rel=1e-5)
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


METHODS_OF_THEIR_OWN = ["baseline", "full", "sparse"]


def test_texts_beyond_a_position_table_make_it_longer_for_every_method(run, make_base, saved_model, caplog, capsys):
    config = make_base("gpt2").config
    config.n_positions = 20
    GPT2LMHeadModel(config).save_pretrained(saved_model)
    groups = ("--s2_attn", "--s2_group_size", 16, "--max_length", 32, "--lr", 1e-3)
    with caplog.at_level(logging.INFO, "hylorada"):
        code, rows = run("--methods", *METHODS_OF_THEIR_OWN, "hylorada", *groups)
    assert code == 0 and "has 20 learned positions: its table is made longer for every method" in caplog.text
    assert "full has no use for s2_attn_enabled=True; the flag is for the others" in caplog.text
    for row in rows:
        assert row["perplexity_before"] == pytest.approx(rows[0]["perplexity_before"], rel=1e-5)
        assert row["settings"]["rope_scaling_factor"] == 1.6
    given = ("--rope_scaling_type", "auto", "--rope_scaling_factor", 1.2)
    assert run("--methods", "lora", *given) == (2, [])
    assert "takes the 20 learned positions" in capsys.readouterr().err


def test_every_seed_is_a_run_of_its_own(run, tmp_path):
    _, rows = run("--methods", "baseline", "lora", "hylorada", "--seeds", 3, 4)
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("baseline", 3),
        ("lora", 3),
        ("hylorada", 3),
        ("lora", 4),
        ("hylorada", 4),
    ]
    # an adapter starts as the base model: what is known of one seed holds for the next
    assert rows[1]["losses_before"] == rows[3]["losses_before"]
    assert rows[1]["steps"]["loss"] != rows[3]["steps"]["loss"]
    assert rows[1]["losses_after"] != rows[3]["losses_after"]
    for row in rows:
        weights, losses = row["weights"], row["losses_after"]
        assert sum(weights) == row["data"]["held-out tokens"] and len(weights) == len(losses) == 8
        mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
        assert row["perplexity_after"] == pytest.approx(math.exp(mean))
    _, again = run("--methods", "lora", "--seed", 4)
    assert again[0]["losses_after"] == rows[3]["losses_after"]


def test_rates_are_searched_for_without_the_test_documents(run, tmp_path, monkeypatch):
    held_out = []

    def watching(comparison, *rest):
        held_out.append({row["document"] for row in comparison.test_rows})
        return run_arm(comparison, *rest)

    monkeypatch.setattr(benchmark, "_run", watching)
    monkeypatch.setattr(benchmark, "_learning_rates", lambda _, arms: dict.fromkeys(arms, 5e-5))
    options = ["--methods", "baseline", "lora", "dora", "--lr_grid", "1e-4", "2e-2", "--seeds", "0", "1"]
    assert flags.parse(flags.benchmark_parser(), options).lr_grid == ["1e-4", "2e-2"]
    shared = ["--model", tmp_path / "model", "--dataset", tmp_path / "texts", "--output_dir", tmp_path / "results"]
    small = ["--max_length", 32, "--steps", 6, "--batch_size", 2, "--num_test", 8]
    assert main("benchmark", *shared, *small, *options) == 0

    # two rates of two methods, then the baseline and two methods with two seeds
    search, final = held_out[:4], held_out[4:]
    assert len(final) == 5 and not set.union(*search) & set.union(*final)
    (folder,) = (tmp_path / "results").iterdir()
    results = json.loads((folder / "results.json").read_text())
    for name, losses in results["searches"].items():
        assert losses["0.02"] < losses["0.0001"]
        assert {row["learning_rate"] for row in results["rows"] if row["method"] == name} == {2e-2}
    assert set(results["searches"]) == {"lora", "dora"}
    assert "## Learning rates" in (folder / "report.md").read_text()


def test_a_rate_that_diverges_is_out_and_the_search_goes_on(tmp_path, monkeypatch, capsys):
    def measured(comparison, arm, rate, seed, before):
        if rate > 1:
            raise DivergedError("step 3 has the loss nan")
        return {"perplexity_after": 7.0 - rate}

    monkeypatch.setattr(benchmark, "_run", measured)
    data = comparison.Comparison("m", "fp32", {}, TrainingConfig(), [], [])
    path, lora = tmp_path / "search.json", comparison.Arm("lora", "lora")
    found = benchmark._search_rates(data, [lora], [2.0, 1e-2, 3.0], 0, path)
    assert found == {"lora": {2.0: math.inf, 1e-2: 6.99, 3.0: math.inf}}
    assert json.loads(path.read_text()) == {"lora": {"2": None, "0.01": 6.99, "3": None}}
    with pytest.raises(ValueError, match=r"^--lr_grid: lora diverges at every rate of 2, 3$"):
        benchmark._search_rates(data, [lora], [2.0, 3.0], 0, path)


def test_a_method_that_decides_for_itself_runs_beside_shared_flags(run, caplog):
    flags = ("--s2_attn", "--s2_group_size", 8, "--sink_tokens", 1, "--train_embeddings", "all", "--train_norms")
    with caplog.at_level(logging.INFO):
        code, rows = run("--methods", "lora", "longlora", "hylorada", *flags)
    assert code == 0
    configs = {row["method"]: row["config"] for row in rows}
    assert [configs[name]["s2_shift_mode"] for name in configs] == ["layers", "heads", "layers"]
    assert [configs[name]["train_embeddings"] for name in configs] == ["all", "tokens", "all"]
    for config in configs.values():
        assert config["s2_attn_enabled"] and config["train_norms"]
        assert (config["s2_group_size"], config["s2_sink_tokens"]) == (8, 1)
    said = "longlora decides train_embeddings='tokens' itself"
    assert sum("decides" in message for message in caplog.messages) == 1 and said in caplog.text


def test_groups_of_one_method_leave_the_others_alone(run):
    _, rows = run("--methods", "lora", "longlora", "--s2_group_size", 8)
    lora, longlora = (HyLoRADAConfig.from_dict(row["config"]) for row in rows)
    assert not lora.s2_attn_enabled and not lora.idle_options() and not lora.train_norms
    assert longlora.s2_attn_enabled and longlora.s2_group_size == 8


def test_the_parts_are_ablated_one_by_one(run, tmp_path):
    code, rows = run("--steps", 2, "--num_test", 3, command="ablate")
    assert code == 0
    configs = {row["method"]: row["config"] for row in rows if row["config"]}
    linears = configs["linears"]
    changes = {
        name: {field: value for field, value in config.items() if value != linears[field]}
        for name, config in configs.items()
    }
    assert linears["use_rslora"] and linears["use_blend"] and linears["lora_init"] == "orthogonal"
    assert not linears["position_bias_enabled"] and not linears["landmark_enabled"]
    assert changes["position"] == {"position_bias_enabled": True}
    assert changes["landmarks"] == {"landmark_enabled": True}
    assert changes["both"] == {"position_bias_enabled": True, "landmark_enabled": True}
    assert changes["blend-0"] == {"use_blend": False}
    assert changes["blend-1"] == {"use_dora_magnitude": False}
    assert changes["kaiming"] == {"lora_init": "kaiming"}
    assert [row["method"] for row in rows] == ["baseline", *configs] and {"lora", "rslora", "dora"} < set(configs)
    # the same numbers start the same: what an arm lacks or has is all that tells it from the others
    losses = {row["method"]: row["steps"]["loss"][0] for row in rows if row["steps"]}
    assert all(losses[name] == pytest.approx(losses["linears"], rel=1e-6) for name in ("both", "blend-0", "blend-1"))
    report = next((tmp_path / "results").iterdir()) / "report.md"
    assert "| against linears |" in report.read_text() and "- **blend-1**: " in report.read_text()


def test_full_and_shifted_attention_are_ablated(run):
    arguments = ("--ablation", "attention", "--arms", "lora", "lora-s2", "all-s2", "--s2_group_size", 8)
    rope = ("--original_length", 16, "--rope_scaling_type", "linear", "--rope_scaling_factor", 2)
    code, (lora, grouped, everything) = run(*arguments, *rope, command="ablate")
    assert code == 0
    assert lora["perplexity_before"] == pytest.approx(grouped["perplexity_before"], rel=1e-5)
    assert abs(lora["steps"]["loss"][0] - grouped["steps"]["loss"][0]) > 1e-3
    assert everything["config"]["s2_group_size"] == 8 and everything["config"]["landmark_enabled"]
    assert lora["settings"]["original_length"] == 16
    # a declared length alone leaves the angles; the scaled ones make another model
    _, (unscaled,) = run("--ablation", "attention", "--arms", "lora", command="ablate")
    assert lora["perplexity_before"] != pytest.approx(unscaled["perplexity_before"], rel=1e-5)


def test_the_authors_protocol_learns_padding_and_averages_lines(run):
    code, rows = run("--protocol", "author", "--num_test", 2, "--steps", 3, command="ablate")
    assert code == 0 and [row["method"] for row in rows] == ["baseline", "lora", "position", "landmarks"]
    for row in rows:
        assert row["perplexity_after"] == pytest.approx(sum(map(math.exp, row["losses_after"])) / 2)
        assert row["weights"] == [1, 1] and row["settings"]["protocol"] == "author"
    # 2 lines of 32 tokens, 31 of them predicted, in each of 16 batches of a step: 8 lines make 4 batches
    assert rows[1]["steps"]["tokens"] == [8 * 31] * 3
    counts = [row["trainable_parameters"] for row in rows]
    assert counts[2] == counts[1] + 65
    # K vectors and K gates of 32 features, K gates for each of 64 buckets, the factor
    assert counts[3] == counts[1] + 2 * 8 * 32 + 64 * 8 + 1


def test_every_ablation_has_its_flag():
    assert tuple(ablation.ABLATIONS) == flags.ABLATION_NAMES


def test_the_authors_protocol_names_what_cannot_be_had(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "load_documents", lambda _: [Document("a", "one\ntwo"), Document("b", "three")])
    options = flags.parse(flags.ablation_parser(), ["--protocol", "author", "--epochs", "2"])
    assert (options.model, options.dataset, options.num_test) == ("openai-community/gpt2", "wikitext", 500)
    assert (options.batch_size, options.grad_accum, options.epochs) == (4, 16, 2)
    assert main("ablate", "--protocol", "author") == 2
    assert "model 'openai-community/gpt2' cannot be had" in capsys.readouterr().err


def test_an_unknown_arm_is_named(run, capsys):
    assert run("--arms", "linears", "kernels", command="ablate") == (2, [])
    assert "--ablation parts has no kernels: use baseline, lora, rslora," in capsys.readouterr().err


def test_rates_are_given_or_searched_for(capsys):
    assert main("benchmark", "--lr", "1e-3", "--lr_grid", "1e-3", "2e-3") == 2
    assert "--lr and --lr_grid exclude each other" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_of_its_own_measures_the_same(run, monkeypatch):
    _, here = run("--methods", "lora")
    monkeypatch.setattr(benchmark, "_run", run_in_own_process)
    _, apart = run("--methods", "lora")
    assert apart[0]["losses_after"] == pytest.approx(here[0]["losses_after"], rel=1e-5)


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_arm_whose_process_is_killed_is_named(monkeypatch):
    monkeypatch.setattr(comparison, "run_arm", die)
    with pytest.raises(RuntimeError, match="the process of lora, seed 3, was killed, most often for want of memory"):
        run_in_own_process(None, comparison.Arm("lora", "lora"), 1e-3, 3, None)


def test_an_arm_ends_with_the_comparison_that_started_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from hylorada import comparison\n"
        "def linger(*_):\n"
        "    print(os.getpid(), flush=True)\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    comparison.run_arm = linger\n"
        "    comparison.run_in_own_process(None, None, None, 0, None)\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        arm = int(parent.stdout.readline())
        parent.kill()
    # its parent is no longer there to collect it, so that it is gone at once when it ends
    deadline = time.monotonic() + 60
    while Path(f"/proc/{arm}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{arm}").exists()


def test_the_ablation_starts_from_anywhere(tmp_path):
    path = Path(__file__).parents[2] / "benchmarks/run_ablation.py"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, path, "--help"]
    outcome = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0 and "--lr_grid" in outcome.stdout, outcome.stderr


def test_runs_of_one_second_have_folders_of_their_own(tmp_path):
    now = datetime(2026, 1, 2, 3, 4, 5)
    made = [benchmark._make_directory(tmp_path / "results", now) for _ in range(3)]
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
        options = flags.parse(flags.benchmark_parser(), [*arguments, *more])
        documents = benchmark.load_documents(options.dataset)
        comparison, _ = benchmark._prepare(options, documents, tokenizer, {})
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


def test_results_survive_a_later_failure(run, capsys, monkeypatch):
    def failing(comparison, arm, *rest):
        if arm.name == "dora":
            raise RuntimeError("out of memory")
        return run_arm(comparison, arm, *rest)

    monkeypatch.setattr(benchmark, "_run", failing)
    code, rows = run("--methods", "lora", "dora")
    assert code == 2 and [row["method"] for row in rows] == ["lora"]
    assert "error: out of memory" in capsys.readouterr().err


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
SEED_ABLATION = "--num_train 500 --epochs 1"


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
    ],
)
def test_bad_flags_are_named_before_anything_is_loaded(run, monkeypatch, capsys, arguments, message):
    def loading(*_):
        raise AssertionError("loaded")

    monkeypatch.setattr(benchmark, "load_documents", loading)
    monkeypatch.setattr(benchmark, "load_pretrained", loading)
    assert run(*arguments) == (2, [])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", SEED_COMMANDS)
def test_every_flag_of_the_documented_commands_is_known(command):
    options = flags.benchmark_parser().parse_args(command.split())
    assert options.epochs in (1, 3) and options.methods


def test_the_documented_ablation_is_known():
    options = flags.parse(flags.ablation_parser(), SEED_ABLATION.split())
    assert (options.num_train, options.epochs, options.seeds) == (500, 1, [0])
