"""The interpreter itself: it computes bf16 as a GPU does, and no stray access passes."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    grid = offs[:, None] * SIZE + offs[None, :]  # [SIZE, SIZE]
    product = tl.dot(tl.load(a_ptr + grid), tl.load(b_ptr + grid))
    tl.store(out_ptr + grid, product.to(out_ptr.dtype.element_ty))


@triton.jit
def copy_kernel(x_ptr, out_ptr, stride_x, stride_out, first_read, first_write, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x_ptr + first_read + offs * stride_x)
    tl.store(out_ptr + first_write + offs * stride_out, value)


@triton.jit
def same_element_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, tl.load(x_ptr))


@triton.jit
def neighbour_kernel(out_ptr):
    pid = tl.program_id(0)
    tl.store(out_ptr + pid, tl.load(out_ptr + tl.maximum(pid - 1, 0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_and_rounding(dtype):
    a, b = torch.randn(2, 16, 16, dtype=dtype)
    out = torch.empty(16, 16, dtype=dtype)
    a[0, 0], a[1, 1] = float("inf"), float("nan")
    dot_kernel[(1,)](a, b, out, 16)
    expected = (a.double() @ b.double()).to(dtype)
    one_step = torch.finfo(dtype).eps  # sums in fp32 and in fp64 may round to neighbours
    torch.testing.assert_close(out, expected, rtol=one_step, atol=1e-5, equal_nan=True)


def test_bf16_rounds_to_nearest():
    x = torch.randn(64).mul(1e3)
    out = torch.empty(64, dtype=torch.bfloat16)
    copy_kernel[(4,)](x, out, 1, 1, 0, 0, 16)
    assert torch.equal(out, x.bfloat16())


@pytest.mark.parametrize(
    "x, stride_x, stride_out, first_read, first_write",
    [
        (torch.zeros(32), 1, 1, 1, 0),  # one past the end
        (torch.zeros(32), 1, 1, -1, 0),  # one before the start
        (torch.zeros(32), 1, 1, 0, 1),
        (torch.zeros(64)[::2], 1, 1, 0, 0),  # between the elements of a view
        (torch.zeros(32), 1, 0, 0, 0),  # all lanes store to one element
    ],
)
def test_stray_accesses_are_caught(x, stride_x, stride_out, first_read, first_write):
    out = torch.zeros(32)
    copy_kernel[(2,)](x, out, x.stride(0), 1, 0, 0, 16)  # as it should be
    with pytest.raises(Exception, match=r"belong to no element|two lanes"):
        copy_kernel[(2,)](x, out, stride_x, stride_out, first_read, first_write, 16)


def test_races_between_programs_are_caught():
    same_element_kernel[(1,)](torch.zeros(1), torch.zeros(1))
    with pytest.raises(Exception, match=r"touches what program \[0 0 0\] wrote"):
        same_element_kernel[(2,)](torch.zeros(1), torch.zeros(1))
    with pytest.raises(Exception, match=r"touches what program \[0 0 0\] wrote"):
        neighbour_kernel[(2,)](torch.zeros(2))
