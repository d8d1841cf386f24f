"""What the benchmarks measure with: paired times, their spread, the counts of a roofline, the pictures."""

import json

import pytest
import torch

from benchmarks import compare, conftest, plots
from benchmarks.paired import median_ratio, paired_times, ratio_spread
from benchmarks.roofline import Work, attention_work, column_norm_work, linear_backward_work, linear_forward_work
from hylorada.estimate import count_attended_pairs
from hylorada_kernels import column_norm, hybrid_linear, shifted_attention, testing, using
from hylorada_kernels.testing import interpreter, linear_inputs


def test_ratios_and_spreads_are_those_of_rounds():
    times = {"a": [2.0, 4.0, 9.0, 4.0], "b": [1.0, 2.0, 3.0, 4.0]}
    assert median_ratio(times, "a", "b") == 2.0
    # ratios 1, 2, 2, 3: a twentieth lies below 1.15, one above 2.85
    assert ratio_spread(times, "a", "b") == pytest.approx(0.85)
    assert ratio_spread({"a": [3.0], "b": [1.0]}, "a", "b") == 0.0


def test_processor_seconds_come_from_the_same_rounds():
    processor: dict[str, list[float]] = {}
    times = paired_times({"busy": lambda: sum(range(20_000))}, seconds=0, fewest=3, processor=processor)
    assert len(times["busy"]) == len(processor["busy"]) == 3
    assert all(seconds >= 0 for seconds in processor["busy"])


def test_parts_of_a_contender_run_beside_those_of_the_others():
    calls = []
    contenders = {name: [lambda part=name + part: calls.append(part) for part in "12"] for name in "ab"}
    times = paired_times(contenders, seconds=0, fewest=3, warmup=1)
    assert [len(times[name]) for name in "ab"] == [3, 3]
    rounds = [calls[start : start + 4] for start in range(0, len(calls), 4)]
    assert len(rounds) == 4 and all([set(r[:2]), set(r[2:])] == [{"a1", "b1"}, {"a2", "b2"}] for r in rounds)
    with pytest.raises(ValueError, match="zip"):
        paired_times({"one part": lambda: None, "two": contenders["a"]}, seconds=0)


def test_the_stricter_limit_decides():
    assert Work(flops=100.0, ideal_bytes=10.0).achieved(4.0, limits=(50.0, 10.0)) == 0.5
    assert Work(flops=10.0, ideal_bytes=30.0).achieved(4.0, limits=(50.0, 10.0)) == 0.75


def test_means_are_of_what_every_row_has():
    rows = [{"dtype": "fp32", "a / b": 1.0, "c / b": 2.0, "c, ms": 1.0}, {"dtype": "fp32", "a / b": 4.0, "c, ms": 1.0}]
    assert conftest._geometric_means(rows, ["dtype"]) == [{"dtype": "fp32", "geometric mean of": 2, "a / b": 2.0}]


def moved(log):
    return sum(launch.read + launch.written for launch in log)


needs_interpreter = pytest.mark.skipif(not interpreter.supported(), reason=interpreter.requires_interpreter)


@needs_interpreter
def test_no_kernel_moves_less_than_the_ideal_bytes_of_its_layer():
    testing.interpret()
    given = linear_inputs(64, 96, 128, 4, dtype=torch.bfloat16, bias=False, token_scale=False)
    weight, a, b = given.weight, given.lora_a, given.lora_b
    with using("triton"):
        with interpreter.traffic() as log:
            norm = column_norm(weight, a, b, scale=given.scale)
        assert 1.0 <= moved(log) / column_norm_work(96, 128, 4, 2).ideal_bytes <= 1.10

        x = given.x.requires_grad_()
        trained = [tensor.requires_grad_() for tensor in (a, b, given.magnitude)]
        with interpreter.traffic() as log:
            y = hybrid_linear(x, weight, *trained, given.blend, scale=given.scale, norm=norm)
        assert 1.0 <= moved(log) / linear_forward_work(64, 96, 128, 4, 2).ideal_bytes <= 1.40
        with interpreter.traffic() as log:
            y.backward(given.dy)
        assert 0.95 <= moved(log) / linear_backward_work(64, 96, 128, 4, 2).ideal_bytes <= 1.40


@needs_interpreter
def test_attention_moves_its_ideal_bytes_in_one_group():
    testing.interpret()
    q, k, v = (torch.randn(1, heads, 32, 32) for heads in (4, 2, 2))
    with using("triton"), torch.no_grad(), interpreter.traffic() as log:
        shifted_attention(q, k, v, group_size=32)
    work = attention_work(4 * count_attended_pairs(32), 32, 4, 2, 32, 4)
    assert moved(log) == pytest.approx(work.ideal_bytes, rel=0.05)
    assert work.flops == 4 * 32 * 4 * 32 * 33 / 2


@pytest.mark.parametrize("over", [None, "rank"])
def test_pictures_are_drawn_of_ratios_or_over_a_key(tmp_path, over):
    rows = [{"layer": "a", "rank": rank, "x, ms": 1.0 * rank, "x / y": 0.5 * rank} for rank in (1, 2, 4)]
    assert plots.draw("title", rows, ["layer", "rank"], over, tmp_path / "it.png")
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    assert not plots.draw("title", [{"layer": "a", "x, ms": 1.0}], ["layer"], None, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_two_runs_are_compared_ratio_by_ratio(tmp_path, capsys):
    for name, ratio in (("first", 1.0), ("second", 1.3)):
        rows = [
            {"layer": "near", "rank": 8, "x, ms": 3.0, "x / y": 1.0 + ratio / 100, "±": 0.02},
            {"layer": "far", "rank": 8, "x, ms": 3.0, "x / y": ratio, "z / y": 9.0, "±": 0.02},
            {"layer": "no spread", "rank": 8, "x / y": ratio},
        ]
        (tmp_path / name).mkdir()
        (tmp_path / name / "table.json").write_text(json.dumps({"rows": rows}))
    assert compare.main([str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "table: far, 8: 1.000 and 1.300, spread 0.020",
        "1 of 2 ratios within their spread",
    ]
