"""Results on paper say what was measured."""

import json

import pytest

from hylorada.report import comparison_table, report_text, running_mean, write_report

FACTS = {
    "model": "tiny",
    "data": {"name": "verses", "test tokens": 512},
    "settings": {"warmup_ratio": 0.1, "max_steps": None},
    "seed": 7,
    "command": "python run_benchmark.py --seed 7",
    "commit": "0123456789ab",
    "versions": {"torch": "2.13.0", "peft": None},
    "machine": {"cpu": "two cores", "gpu": None},
    "time": "2026-01-02T03:04:05+00:00",
}


@pytest.fixture
def rows():
    measured = {"peak_memory_mib": 1234.56, "perplexity_before": 22.8825}
    baseline = {
        "trainable_parameters": 0,
        "learning_rate": None,
        "seconds_per_step": None,
        "perplexity_after": 22.8825,
        "steps": [],
    }
    steps = [{"step": 1, "loss": 3.1}, {"step": 2, "loss": 3.0}]
    adapted = {
        "trainable_parameters": 967946,
        "learning_rate": 1e-3,
        "seconds_per_step": 1.345,
        "perplexity_after": 19.6891,
        "steps": steps,
    }
    return [
        {"method": "baseline", **measured, **baseline, **FACTS},
        {"method": "hylorada", **measured, **adapted, **FACTS},
    ]


def test_table_shows_every_measurement(rows):
    assert comparison_table(rows).splitlines() == [
        "| method   | trainable parameters |    lr | s/step | peak MiB | ppl before | ppl after |",
        "|----------|---------------------:|------:|-------:|---------:|-----------:|----------:|",
        "| baseline |                    0 |     - |      - |    1,235 |     22.883 |    22.883 |",
        "| hylorada |              967,946 | 0.001 |   1.34 |    1,235 |     22.883 |    19.689 |",
    ]


def test_report_holds_the_facts_of_the_run(rows):
    text = report_text(rows)
    assert comparison_table(rows) in text
    for line in (
        "| data | name verses, test tokens 512 |",
        "| settings | warmup_ratio 0.1 |",
        "| command | python run_benchmark.py --seed 7 |",
        "| versions | torch 2.13.0 |",
        "| machine | cpu two cores |",
    ):
        assert line in text


def test_files_are_complete(rows, tmp_path):
    paths = write_report(rows, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["results.json", "report.md", "loss.png"]
    assert json.loads(paths[0].read_text())["rows"] == rows
    assert paths[1].read_text() == report_text(rows)
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_curves_need_no_trained_method(rows, tmp_path):
    assert write_report(rows[:1], tmp_path)[2].stat().st_size > 0


def test_running_mean_forgets():
    assert running_mean([4.0, 2.0, 1.0], memory=0.5) == pytest.approx([4.0, (2 + 2) / 1.5, (1 + 1 + 1) / 1.75])
    assert running_mean([3.0] * 5) == pytest.approx([3.0] * 5)
