"""Results on paper say what was measured."""

import json
import math
import re
from html.parser import HTMLParser

import pytest

from hylorada.report import (
    comparison_table,
    difference_table,
    differences,
    report_page,
    report_text,
    running_mean,
    write_report,
)

FACTS = {
    "model": "tiny",
    "data": {"name": "verses", "test tokens": 512},
    "settings": {"warmup_ratio": 0.1, "max_steps": None},
    "command": "python run_benchmark.py --seeds 7 8",
    "commit": "0123456789ab",
    "versions": {"torch": "2.13.0", "peft": None},
    "machine": {"cpu": "two cores & a fan", "gpu": None},
    "time": "2026-01-02T03:04:05+00:00",
}
WEIGHTS = [100, 100, 50]


def run(method, seed, losses, rate=1e-3, parameters=967946, meaning=""):
    """A row whose windows have these losses after training, and the loss 3 before."""
    mean = sum(loss * weight for loss, weight in zip(losses, WEIGHTS, strict=True)) / sum(WEIGHTS)
    measured = {"trainable_parameters": parameters, "learning_rate": rate, "seconds_per_step": 1.345 + seed}
    measured |= {"losses_before": [3.0] * 3, "losses_after": losses, "weights": WEIGHTS, "peak_memory_mib": 1234.56}
    measured |= {"perplexity_before": math.exp(3), "perplexity_after": math.exp(mean)}
    return {"method": method, "meaning": meaning, "seed": seed, **measured, "steps": {"loss": [3.1, 3.0]}, **FACTS}


@pytest.fixture
def rows():
    baseline = run("baseline", 7, [3.0] * 3, None, 0) | {"seconds_per_step": None, "steps": {}}
    lora = [run("lora", 7, [2.8, 2.9, 3.0]), run("lora", 8, [2.7, 2.8, 3.1])]
    ours = [run("hylorada", 7, [2.7, 2.8, 2.9], meaning="all <of> it"), run("hylorada", 8, [2.6, 2.6, 3.0])]
    return [baseline, lora[0], ours[0], lora[1], ours[1]]


def test_table_shows_every_measurement(rows):
    before, lora = math.exp(3), [math.exp((280 + 290 + 150) / 250), math.exp((270 + 280 + 155) / 250)]
    mean, spread = sum(lora) / 2, abs(lora[0] - lora[1]) / math.sqrt(2)
    gain = 100 * (1 - mean / before)
    header, rule, baseline, first, _ = comparison_table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, baseline, first)]
    names = "method, trainable parameters, lr, s/step, peak MiB, ppl before, ppl after, sd of seeds, gain %"
    assert cells[0] == [*names.split(", "), "parameters per 1 %"]
    assert cells[1] == ["baseline", "0", "-", "-", "1,235", "20.086", "20.086", "-", "-", "-"]
    measured = [f"{mean:.3f}", f"{spread:.3f}", f"{gain:.2f}", f"{967946 / gain:,.0f}"]
    assert cells[2] == ["lora", "967,946", "0.001", "8.85", "1,235", "20.086", *measured]
    assert len({len(line) for line in (header, rule, baseline, first)}) == 1 and set(rule) <= set("|-:")


def test_differences_are_paired_by_window_and_by_seed(rows):
    assert list(differences(rows)) == ["hylorada"]
    windows, seeds = differences(rows)["hylorada"]
    # by window, over both seeds: -0.1, -0.15, -0.1; by seed, over the tokens: -0.1 and -0.1 x 150 - 0.2 x 100 of 250
    assert windows.mean == pytest.approx((-0.1 * 100 - 0.15 * 100 - 0.1 * 50) / 250)
    assert windows.low == pytest.approx(-0.15) and windows.high == pytest.approx(-0.1)
    assert seeds.mean == pytest.approx((-0.1 - 0.14) / 2) == pytest.approx(windows.mean)
    assert (seeds.low, seeds.high) == pytest.approx((-0.14, -0.1))
    percent = [f"{100 * math.expm1(loss):+.2f}" for loss in (-0.12, -0.15, -0.1, -0.14, -0.1)]
    line = [cell.strip() for cell in difference_table(rows).splitlines()[2].strip("|").split("|")]
    intervals = [f"{percent[1]} to {percent[2]}", f"{percent[3]} to {percent[4]}"]
    assert line == ["hylorada", percent[0], *intervals, "better"]


def test_differences_may_have_another_reference(rows):
    turned = differences(rows, "hylorada")["lora"]
    assert [interval.mean for interval in turned] == pytest.approx([0.12, 0.12])
    assert difference_table(rows, "hylorada").splitlines()[0].startswith("| against hylorada |")
    assert difference_table(rows, "hylorada").splitlines()[2].rstrip("| ").endswith("worse")
    # before the reference has run, the first trained method stands for it
    assert difference_table(rows, "dora") == difference_table(rows)


def test_nothing_is_called_a_difference_where_an_interval_holds_zero(rows):
    rows[4] = run("hylorada", 8, [2.8, 2.9, 3.2])
    assert difference_table(rows).splitlines()[2].rstrip("| ").endswith("none shown")
    single = difference_table(rows[:3]).splitlines()[2]
    assert single.rstrip("| ").endswith("one seed") and "| - |" in re.sub(" +", " ", single)
    assert difference_table(rows[:2]) == ""


def test_report_holds_the_facts_of_the_run(rows):
    text = report_text(rows, {"lora": {1e-3: 21.5, 2e-3: 21.25}})
    assert comparison_table(rows) in text and difference_table(rows) in text
    for line in (
        "| data | name verses, test tokens 512 |",
        "| settings | warmup_ratio 0.1 |",
        "| command | python run_benchmark.py --seeds 7 8 |",
        "| versions | torch 2.13.0 |",
        "| machine | cpu two cores & a fan |",
        "| lora                  | 21.500 | 21.250 * |",
        "- **hylorada**: all <of> it",
        "tiny on verses: 2 steps, 2 seeds (7, 8), 5 runs.",
    ):
        assert line in text


def test_perplexity_by_row_is_named_as_such(rows):
    assert "weighted by tokens" in report_text(rows)
    for row in rows:
        row["settings"] = {"protocol": "author"}
    assert "mean of each held-out line's own" in report_text(rows)


class Page(HTMLParser):
    """Collects what a page refers to, its texts, and whether its elements close."""

    def __init__(self):
        super().__init__()
        self.sources, self.texts, self.open = [], [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_page_needs_no_other_file_and_holds_the_same_numbers(rows, tmp_path):
    paths = write_report(rows, tmp_path)
    text = paths[2].read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert not page.open
    assert len(page.sources) == 3 and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in text and "url(" not in text
    for table in (comparison_table(rows), difference_table(rows)):
        for cell in re.split(r"\s*\|\s*", table.replace("\n", "")):
            assert set(cell) <= set("-:") or cell in page.texts
    assert "all <of> it" in page.texts
    assert report_page(rows, paths[3:]) == text


def test_files_are_complete(rows, tmp_path):
    paths = write_report(rows, tmp_path / "new" / "folder", {"lora": {1e-3: 21.5}})
    names = ["results.json", "report.md", "report.html", "loss.png", "perplexity.png", "differences.png"]
    assert [path.name for path in paths] == names
    assert json.loads(paths[0].read_text()) == {"searches": {"lora": {"0.001": 21.5}}, "rows": rows}
    assert paths[1].read_text() == report_text(rows, {"lora": {1e-3: 21.5}})
    for path in paths[3:]:
        assert path.read_bytes().startswith(b"\x89PNG")
    linked = re.findall(r"!\[[^]]*\]\(([^)]*)\)", paths[1].read_text())
    assert sorted(linked) == sorted(names[3:])


def test_pictures_need_no_trained_method(rows, tmp_path):
    paths = write_report(rows[:1], tmp_path)
    assert [path.name for path in paths[3:]] == ["loss.png", "perplexity.png"]
    assert all(path.stat().st_size > 0 for path in paths)


def test_running_mean_forgets():
    assert running_mean([4.0, 2.0, 1.0], memory=0.5) == pytest.approx([4.0, (2 + 2) / 1.5, (1 + 1 + 1) / 1.75])
    assert running_mean([3.0] * 5) == pytest.approx([3.0] * 5)
