"""Which route a call takes, and what `tune` measures and keeps."""

import json
from pathlib import Path

import pytest
import torch

from hylorada_kernels import backend
from hylorada_kernels.__main__ import main

if not backend.HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

from hylorada_kernels import tuning
from hylorada_kernels.ops.hybrid_linear import dispatch
from hylorada_kernels.ops.hybrid_linear.dispatch import forward_route, machine, read_tuning, taking

BF16 = torch.bfloat16


@pytest.fixture
def on(monkeypatch):
    """on(90): launches are for that architecture."""
    return lambda architecture: monkeypatch.setattr(dispatch, "target_architecture", lambda: architecture)


def route(tokens=4096, columns=4096, rank=16, dtype=BF16, *, knows_norm=True, has_dropout=False):
    return forward_route(tokens, columns, rank, dtype, knows_norm=knows_norm, has_dropout=has_dropout)


def test_few_tokens_take_one_pass(on):
    on(90)
    assert [route(tokens) for tokens in (1, 16, 17)] == ["one_pass", "one_pass", "fused"]
    assert route(16, rank=33) == route(16, has_dropout=True) == "fused"


def test_an_unknown_norm_is_made_in_one_pass_up_to_256_tokens(on):
    on(90)
    routes = [route(tokens, knows_norm=False) for tokens in (17, 256, 257)]
    assert routes == ["one_pass", "one_pass", "fused"]
    assert route(256, rank=33, knows_norm=False) == "fused"


@pytest.mark.parametrize(("architecture", "switch_over"), [(80, 2250), (90, 7900), ("gfx942", 2250), (77, 2250)])
def test_many_in_features_go_to_the_library(on, architecture, switch_over):
    on(architecture)
    assert [route(columns=columns) for columns in (switch_over, switch_over + 1)] == ["fused", "library"]


def test_fp32_goes_to_the_library_and_the_interpreter_never(on):
    on(90)
    assert [route(tokens, 64, dtype=torch.float32) for tokens in (16, 17)] == ["one_pass", "library"]
    on(None)
    assert route(columns=10**6, dtype=torch.float32) == "fused"


def test_a_route_that_does_not_exist_is_refused():
    with (
        pytest.raises(ValueError, match="taking\\('cublas'\\): the routes are one_pass, fused, library"),
        taking("cublas"),
    ):
        pass


@pytest.mark.parametrize("text", ["", "[]", "{", '{"fused_up_to": "many"}', '{"fused_up_to": -1}', "{}"])
def test_a_damaged_tuning_file_is_reported_and_left_aside(tmp_path, caplog, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    assert read_tuning(path) is None
    assert "using the defaults" in caplog.text


def test_without_a_home_directory_the_table_decides_and_tune_says_that_nothing_is_kept(monkeypatch, capsys):
    def nowhere():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(tuning, "tune", lambda: tuning.Measurement(fused_up_to=3000, ratios={2048: 0.9, 4096: 1.1}))
    assert dispatch._measured_switch_over.__wrapped__() is None
    assert main(["tune"]) == 1
    printed = capsys.readouterr()
    assert "fused up to 3000 in-features on a GPU" in printed.out and "no home directory; set HOME" in printed.err


def test_what_was_measured_decides(on, tmp_path, monkeypatch):
    on(90)
    path = tmp_path / "gpu.json"
    tuning.write(path, tuning.Measurement(fused_up_to=3000, ratios={2048: 0.9, 4096: 1.1}), "a GPU")
    monkeypatch.setattr(dispatch, "_measured_switch_over", lambda: read_tuning(path))
    assert machine(BF16).fused_up_to == 3000
    assert [route(columns=columns) for columns in (3000, 3001)] == ["fused", "library"]
    assert json.loads(path.read_text())["gpu"] == "a GPU"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({1024: 0.8, 2048: 0.9, 4096: 1.2}, 2730),
        ({1024: 1.3, 2048: 1.2, 4096: 1.1}, 0),
        ({1024: 0.7, 2048: 0.8, 4096: 0.9}, 2**31),
        # one lucky length among losses does not count
        ({1024: 0.9, 2048: 1.2, 4096: 0.99, 8192: 1.3}, 1365),
    ],
)
def test_the_switch_over_is_where_fused_stops_winning(ratios, expected):
    assert tuning.switch_over(ratios) == expected


def test_tune_says_that_it_needs_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["tune"]) == 1
    assert "needs a GPU" in capsys.readouterr().err
