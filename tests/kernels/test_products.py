"""Products: whichever library makes them, in whatever way, they are the product, to the rounding of their dtype."""

import pytest
import torch

from hylorada_kernels.ops import _products as products
from hylorada_kernels.testing import allowed_error, assert_within, relative_error
from tests.kernels.conftest import choose_library

SHAPES = {
    "small": (48, 40),
    "whole groups": (1024, 640),
    "rows left over": (1030, 640),
    "columns left over": (1024, 650),
    "none": (0, 640),
    "no column": (48, 0),
}
ONEDNN = "mkldnn::_linear_pointwise"
RANKS = [1, 8, products.THIN_RANK, 64]


@pytest.fixture(params=["mkl", "onednn"])
def library(request, monkeypatch):
    choose_library(request.param == "onednn", monkeypatch)
    return request.param


def operands(shape: str, rank: int, dtype: torch.dtype, *, is_transposed: bool = False):
    torch.manual_seed(0)
    rows, columns = SHAPES[shape]
    wide = torch.randn(columns, rows, dtype=dtype).T if is_transposed else torch.randn(rows, columns, dtype=dtype)
    return wide, torch.randn(rows, rank, dtype=dtype), torch.randn(rank, columns, dtype=dtype)


def assert_product(name, result, truth, dtype, length):
    assert result.dtype == dtype, name
    floor = relative_error(truth.to(dtype), truth)
    allowed = allowed_error(floor, dtype, factor=1.05, independent=result.numel(), length=length)
    assert_within(name, result, truth, allowed)


@pytest.mark.parametrize("is_transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_is_the_product(library, shape, rank, dtype, is_transposed):
    wide, thin, factor = operands(shape, rank, dtype, is_transposed=is_transposed)
    exact_wide, exact_thin, exact_factor = wide.double(), thin.double(), factor.double()
    found = {
        "down": (products.project_down(wide, factor), exact_wide @ exact_factor.T),
        "down, in groups": (products.project_down(wide, factor, in_groups=True), exact_wide @ exact_factor.T),
        "up": (products.project_up(thin, factor), exact_thin @ exact_factor),
        "up, scaled": (products.project_up(thin, factor, 0.3), 0.3 * exact_thin @ exact_factor),
        "outer": (products.outer_sum(thin, wide), exact_thin.T @ exact_wide),
        "outer, transposed": (products.outer_sum(thin, wide, is_transposed=True), exact_wide.T @ exact_thin),
    }
    lengths = {"up": rank, "up, scaled": rank, "outer": wide.shape[0], "outer, transposed": wide.shape[0]}
    for name, (result, truth) in found.items():
        assert_product(name, result, truth, dtype, lengths.get(name, wide.shape[1]))


@pytest.mark.parametrize("has_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "layout", ["rows", "columns", "every other row", "every other column", "one row", "off by one"]
)
def test_a_sum_of_products_takes_any_weight(library, layout, dtype, has_bias):
    torch.manual_seed(0)
    weight = {
        "rows": lambda: torch.randn(50, 70, dtype=dtype),
        "columns": lambda: torch.randn(70, 50, dtype=dtype).T,
        "every other row": lambda: torch.randn(100, 90, dtype=dtype)[::2, 10:80],
        "every other column": lambda: torch.randn(50, 140, dtype=dtype)[:, ::2],
        "one row": lambda: torch.randn(1, 70, dtype=dtype).expand(50, 70),
        "off by one": lambda: torch.randn(3501, dtype=dtype)[1:].view(50, 70),
    }[layout]()
    x, thin, factor = (torch.randn(*shape, dtype=dtype) for shape in ((33, 70), (33, 6), (6, 50)))
    bias = torch.randn(50, dtype=dtype) if has_bias else None
    truth = x.double() @ weight.double().T
    shift = 0 if bias is None else bias.double()
    low_rank = 0.5 * thin.double() @ factor.double()
    found = products.add_low_rank(x, weight, thin, factor, 0.5, bias)
    # 16 bits: the narrower term is rounded before the wider one is added to it
    length = 70 + 6 + has_bias
    assert_product("sum", found, truth + low_rank + shift, dtype, length)
    other = torch.randn(33, 50, dtype=dtype)
    exact = truth + other.double()
    assert_product("added", products.add_linear(other, x, weight), exact, dtype, 70)


@pytest.mark.parametrize(
    "call",
    [
        lambda wide, thin, factor: products.project_down(wide, factor),
        lambda wide, thin, factor: products.project_up(thin, factor),
        lambda wide, thin, factor: products.outer_sum(thin, wide),
    ],
    ids=["down", "up", "outer"],
)
@pytest.mark.parametrize(
    ("shape", "rank", "is_batched"),
    [("whole groups", 8, True), ("small", 8, False), ("whole groups", products.THIN_RANK, False)],
    ids=["large and thin", "small", "not thin"],
)
def test_mkl_takes_large_matrices_and_thin_factors_in_groups(call, shape, rank, is_batched, monkeypatch):
    choose_library(False, monkeypatch)
    wide, thin, factor = operands(shape, rank, torch.float32)
    assert ("aten::bmm" in operations(lambda: call(wide, thin, factor))) == is_batched


@pytest.mark.parametrize(("rank", "is_batched"), [(8, True), (products.THIN_RANK, False)])
def test_groups_can_be_asked_for_whatever_size_and_library(library, rank, is_batched):
    wide, _, factor = operands("whole groups", rank, torch.float32)
    found = operations(lambda: products.project_down(wide[:128], factor, in_groups=True))
    assert ("aten::bmm" in found) == is_batched
    assert (ONEDNN in found) == (library == "onednn" and not is_batched)


def test_onednn_makes_plain_fp32_products_where_it_is_on(monkeypatch):
    choose_library(True, monkeypatch)
    wide, thin, factor = operands("whole groups", 8, torch.float32)

    def call():
        return products.add_low_rank(wide, factor, thin, torch.eye(8))

    assert ONEDNN in operations(call)
    with monkeypatch.context() as off:
        off.setattr(torch.backends.mkldnn, "enabled", False)
        assert ONEDNN not in operations(call)
    monkeypatch.setattr(products, "ONEDNN_WORK", 1024 * 640 * 8 + 1)
    assert ONEDNN not in operations(call)
    monkeypatch.setattr(products, "ONEDNN_WORK", 1024 * 640 * 8)
    assert ONEDNN in operations(call)
    wide, factor = wide.as_subclass(Labelled), factor.as_subclass(Labelled)
    assert ONEDNN not in operations(call)


class Labelled(torch.Tensor):
    """Stands for the subclasses that quantize or shard a weight, whose products are theirs to make."""


@pytest.mark.parametrize(
    ("capability", "vendor", "is_quicker"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_onednn_is_for_the_processors_it_was_measured_on(capability, vendor, is_quicker, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None, raising=False)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)

    def unreadable(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(products.Path, "read_text", lambda path: f"vendor_id : {vendor}")
    assert products.has_quicker_onednn.__wrapped__() == is_quicker
    # Windows
    monkeypatch.setattr(products.Path, "read_text", unreadable)
    monkeypatch.setattr(products.platform, "processor", lambda: f"AMD64 Family 25 Model 17, {vendor}")
    assert products.has_quicker_onednn.__wrapped__() == is_quicker
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert not products.has_quicker_onednn.__wrapped__()


def operations(call) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}
