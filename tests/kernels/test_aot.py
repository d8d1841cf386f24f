"""Ahead-of-time compiles: every target takes a GEMM through its host wrapper; the report tells good code from bad."""

import dataclasses

import pytest
import torch

from hylorada_kernels.testing.aot import TARGETS, aot, inspect
from hylorada_kernels.testing.interpreter import interpret, launches, requires_interpreter, supported

pytestmark = pytest.mark.skipif(not supported(), reason=requires_interpreter)

triton = pytest.importorskip("triton", reason=requires_interpreter)
tl = pytest.importorskip("triton.language", reason=requires_interpreter)


@triton.jit
def _linear_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    T,
    N,
    K,
    stride_xt,
    stride_wn,
    stride_ot,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    o_t = ((pid // blocks) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_n = ((pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    accumulator = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        m_k = start + o_k < K
        m_x = (o_t[:, None] < T) & m_k[None, :]
        m_w = (o_n[None, :] < N) & m_k[:, None]
        x = tl.load(x_ptr + o_t[:, None] * stride_xt + start + o_k[None, :], mask=m_x, other=0.0)
        w = tl.load(weight_ptr + o_n[None, :] * stride_wn + start + o_k[:, None], mask=m_w, other=0.0)
        accumulator = tl.dot(x, w, accumulator)
    m_out = (o_t[:, None] < T) & (o_n[None, :] < N)
    tl.store(out_ptr + o_t[:, None] * stride_ot + o_n[None, :], accumulator.to(out_ptr.dtype.element_ty), mask=m_out)


_TILE = {"BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
# one warp cannot hold these accumulators in its registers
_SPILLING_TILE = {"BLOCK_T": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 1, "num_stages": 2}

_tuned_kernel = triton.autotune(
    configs=[triton.Config({"BLOCK_T": 64, "BLOCK_N": n, "BLOCK_K": 32}, num_stages=2) for n in (64, 128)],
    key=["T", "N", "K"],
)(_linear_kernel)


def _linear(x, weight, kernel=_linear_kernel, **options):
    """The host wrapper: allocates, computes the grid, launches."""
    (T, K), N = x.shape, weight.shape[0]
    out = x.new_empty(T, N)

    def grid(meta):
        return (triton.cdiv(T, meta["BLOCK_T"]) * triton.cdiv(N, meta["BLOCK_N"]),)

    kernel[grid](x, weight, out, T, N, K, x.stride(0), weight.stride(0), out.stride(0), **options)
    return out


def _compiled_linear(target, **tile):
    with aot(target) as compiled:
        out = _linear(_meta(512, 256), _meta(384, 256), **tile)
    assert out.is_meta and out.shape == (512, 384)
    return compiled[0]


def _meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


@triton.jit
def _add_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    if ATOMIC:
        tl.atomic_add(out_ptr + offsets, x)
    else:
        tl.store(out_ptr + offsets, tl.load(out_ptr + offsets) + x)


@triton.jit
def _fma_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x * x + 1.5)


@triton.jit
def _too_small_kernel(x_ptr, out_ptr):
    o = tl.arange(0, 16)
    o_k = tl.arange(0, 8)
    x = tl.load(x_ptr + o[:, None] * 8 + o_k[None, :])
    tl.store(out_ptr + o[:, None] * 16 + o[None, :], tl.dot(x, tl.trans(x)))


@pytest.fixture
def fresh_cache(tmp_path):
    """Compiles start from nothing, in memory and on disk."""
    _linear_kernel.device_caches.clear()
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(tmp_path)
        yield
    _linear_kernel.device_caches.clear()


@pytest.mark.parametrize("target", TARGETS)
def test_a_gemm_compiles_for_every_target_to_matrix_instructions_without_spills(target):
    name, constexprs, kernel = _compiled_linear(target, **_TILE)
    assert name == "_linear_kernel" and _TILE.items() <= constexprs.items()
    report = inspect(kernel, target)
    assert report.target == target
    assert report.matrix_instructions
    assert report.spill_stores == report.spill_loads == report.stack_bytes == 0
    assert 32 <= report.registers <= 255
    assert 0 < report.shared_bytes <= report.shared_limit
    assert not report.global_atomics


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("sm80", "HMMA"), ("sm90", "HGMMA"), ("sm100", "UTCHMMA"), ("sm120", "HMMA"), ("gfx942", "v_mfma_f32")],
)
def test_matrix_instructions_are_those_of_the_target(target, instruction):
    report = inspect(_compiled_linear(target, **_TILE).kernel, target)
    assert all(name.startswith(instruction) for name in report.matrix_instructions)


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "sm120"])
def test_pipelined_loads_are_async_copies(target):
    assert inspect(_compiled_linear(target, **_TILE).kernel, target).async_copies


def test_every_configuration_of_an_autotuned_kernel_is_compiled():
    with aot("sm80") as compiled:
        _linear(_meta(512, 256), _meta(384, 256), _tuned_kernel)
    assert [constexprs["BLOCK_N"] for _, constexprs, _ in compiled] == [64, 128]


@pytest.mark.parametrize(("target", "BLOCK_N"), [("sm80", 128), ("sm90", 128), ("gfx942", 256)])
def test_a_tile_too_big_for_the_registers_is_reported_as_spilling(target, BLOCK_N):
    report = inspect(_compiled_linear(target, **{**_SPILLING_TILE, "BLOCK_N": BLOCK_N}).kernel, target)
    assert report.spill_stores > 0 and report.spill_loads > 0 and report.stack_bytes > 0


def test_spills_are_those_that_the_assembler_reports(capfd, fresh_cache):
    with triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        report = inspect(_compiled_linear("sm80", **_SPILLING_TILE).kernel, "sm80")
    log = capfd.readouterr().out
    assert f"Used {report.registers} registers" in log
    assert f"{report.spill_stores} bytes spill stores, {report.spill_loads} bytes spill loads" in log


def test_what_is_read_from_the_cache_is_reported_the_same(fresh_cache, monkeypatch):
    from_cache, reports = [], []
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda *, cache_hit, **_: from_cache.append(cache_hit))
    for _ in range(2):
        _linear_kernel.device_caches.clear()
        reports.append(inspect(_compiled_linear("sm80", **_SPILLING_TILE).kernel, "sm80"))
    assert from_cache == [False, True]
    assert reports[0] == reports[1] and reports[0].spill_stores > 0


@pytest.mark.parametrize("target", ["sm80", "sm90", "gfx942"])
def test_a_global_atomic_is_reported_and_its_absence_too(target):
    x = _meta(256, dtype=torch.float32)
    with aot(target) as compiled:
        for atomic in (True, False):
            _add_kernel[(1,)](x, x, BLOCK=256, ATOMIC=atomic)
    with_atomic, without = (inspect(kernel.kernel, target) for kernel in compiled)
    assert with_atomic.global_atomics and not without.global_atomics
    assert not without.matrix_instructions


def test_a_tile_too_big_for_shared_memory_is_over_the_limit():
    tile = {"BLOCK_T": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 5}
    report = inspect(_compiled_linear("sm86", **tile).kernel, "sm86")
    assert report.shared_bytes > report.shared_limit == 99 * 1024


def test_fusion_is_pinned_on_and_can_be_asked_off():
    x = _meta(256, dtype=torch.float32)
    with aot("sm90") as compiled:
        _fma_kernel[(1,)](x, x, BLOCK=256)
        _fma_kernel[(1,)](x, x, BLOCK=256, enable_fp_fusion=False)
    fused, apart = (kernel.kernel.asm["ptx"] for kernel in compiled)
    assert compiled[0].kernel.metadata.enable_fp_fusion is True
    assert "fma.rn" in fused and "fma.rn" not in apart


def test_alignment_and_sizes_of_meta_tensors_specialise_as_real_ones_do():
    with aot("sm90") as compiled:
        for K in (256, 255):
            _linear(_meta(512, K), _meta(384, K), **_TILE)
    aligned, odd = (inspect(kernel.kernel, "sm90") for kernel in compiled)
    # rows of odd length cannot be copied sixteen bytes at a time
    assert aligned.async_copies and not odd.async_copies


def test_host_code_may_ask_the_driver_for_the_target():
    with aot("sm90"):
        driver = triton.runtime.driver.active
        assert driver.get_current_target().arch == 90
        assert driver.utils.get_device_properties(0)["multiprocessor_count"] == 132


def test_compiling_launches_nothing():
    interpret()
    with launches() as names:
        _compiled_linear("sm90", **_TILE)
    assert names == []


def test_a_grid_beyond_what_a_gpu_takes_is_refused():
    x = _meta(256, dtype=torch.float32)
    with aot("sm90"), pytest.raises(ValueError, match=r"_fma_kernel was launched on the grid \(1, 65536, 1\)"):
        _fma_kernel[(1, 65536)](x, x, BLOCK=256)


def test_cpu_tensors_are_interpreted_inside_too():
    x, weight = torch.randn(70, 40), torch.randn(50, 40)
    with aot("sm90") as compiled:
        out = _linear(x, weight, _tuned_kernel)
    assert not compiled
    torch.testing.assert_close(out, x @ weight.T, atol=0.1, rtol=0)


def test_a_compile_error_leaves_triton_usable():
    for _ in range(2):
        with pytest.raises(Exception, match="K >= 16"), aot("sm90"):
            _too_small_kernel[(1,)](_meta(16, 8, dtype=torch.float16), _meta(16, 16))
        assert inspect(_compiled_linear("sm90", **_TILE).kernel, "sm90").matrix_instructions
        test_cpu_tensors_are_interpreted_inside_too()


def test_targets_nest():
    with aot("sm80") as outer:
        with aot("sm90") as inner:
            _fma_kernel[(1,)](_meta(256), _meta(256), BLOCK=256)
        _fma_kernel[(1,)](_meta(256), _meta(256), BLOCK=256)
    assert [len(outer), len(inner)] == [1, 1]
    assert outer[0].kernel.metadata.target.arch == 80 and inner[0].kernel.metadata.target.arch == 90


def test_shared_memory_limits_are_those_of_the_hardware():
    kib = {name: target.shared_limit // 1024 for name, target in TARGETS.items()}
    assert kib == {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99, "gfx942": 64}


def test_an_unknown_target_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown target 'sm75'; known: sm80, .*gfx942"), aot("sm75"):
        pass


def test_a_report_on_the_wrong_target_is_refused():
    with aot("sm80") as compiled:
        _fma_kernel[(1,)](_meta(256), _meta(256), BLOCK=256)
    with pytest.raises(ValueError, match="not for sm90"):
        inspect(compiled[0].kernel, "sm90")


def test_a_report_is_a_plain_record():
    with aot("sm80") as compiled:
        _fma_kernel[(1,)](_meta(256), _meta(256), BLOCK=256)
    assert dataclasses.asdict(inspect(compiled[0].kernel, "sm80"))["shared_bytes"] == 0
