"""The shadow memory notices each fault it is for, and names kernel, argument and element."""

import pytest
import torch
from shadow_memory import ShadowMemoryError

from ddt_kernels.runtime import cdiv, tensor_descriptor, tl, triton


@triton.jit
def shift_kernel(x_ptr, out_ptr, count, STEP: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """out[i + SHIFT] = x[i] in programs STEP apart."""
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out_ptr + i + SHIFT, tl.load(x_ptr + i, mask=i < count), mask=i < count)


@triton.jit
def descriptor_kernel(x, out, STEP: tl.constexpr):
    start = tl.program_id(0) * STEP
    out.store([start, 0], x.load([start, 0]))


@triton.jit
def atomic_kernel(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


def shift(x, out, count, step=4, shift=0):
    shift_kernel[(cdiv(count, step),)](x, out, count, STEP=step, SHIFT=shift, BLOCK=4)


def test_clean_launches_pass():
    x, out = torch.arange(7.0), torch.zeros(7)
    shift(x, out, 7)
    assert torch.equal(out, x)
    shift(x, x, 7)
    strided = torch.zeros(9, 8)[:, :4]
    matrix = torch.arange(36.0).reshape(9, 4)
    descriptor_kernel[(3,)](tensor_descriptor(matrix, (4, 4)), tensor_descriptor(strided, (4, 4)), STEP=4)
    assert torch.equal(strided, matrix)


def test_an_element_written_by_two_programs():
    with pytest.raises(ShadowMemoryError, match=r"^shift_kernel: program \(1, 0, 0\) writes out_ptr\[2\], .* wrote"):
        shift(torch.zeros(6), torch.zeros(6), 6, step=2)


def test_a_read_of_what_another_program_wrote():
    x = torch.zeros(9)
    with pytest.raises(ShadowMemoryError, match=r"\(1, 0, 0\) reads x_ptr\[4\], which program \(0, 0, 0\) wrote"):
        shift(x[:8], x, 8, shift=1)


def test_a_write_of_what_another_program_read():
    x = torch.zeros(9)
    with pytest.raises(ShadowMemoryError, match=r"\(1, 0, 0\) writes out_ptr\[4\], which program \(0, 0, 0\) read"):
        shift(x[1:], x, 8, shift=0)


@pytest.mark.parametrize("rest", [torch.zeros(8), torch.zeros(5, 2)[:, 0]], ids=["past the end", "between rows"])
def test_an_access_outside_its_tensor(rest):
    """Inside the storage, where nothing else would notice."""
    x, out = torch.zeros(8), torch.zeros(8)
    view = rest[:5]
    with pytest.raises(ShadowMemoryError, match=r"^shift_kernel: program .* reads x_ptr at offset [15], outside"):
        shift(view, out, 8)
    with pytest.raises(ShadowMemoryError, match=r"^shift_kernel: program .* writes out_ptr at offset [15], outside"):
        shift(x, view, 8)


def test_another_argument_is_outside_too():
    x, out = torch.zeros(16).split(8)
    with pytest.raises(ShadowMemoryError, match=r"writes out_ptr at offset -8, outside"):
        shift(x, out, 8, shift=-8)


def test_blocks_of_descriptors_that_overlap():
    x, out = (tensor_descriptor(torch.zeros(8, 4), (4, 4)) for _ in range(2))
    with pytest.raises(ShadowMemoryError, match=r"^descriptor_kernel: program \(1, 0, 0\) writes out\[2, 0\]"):
        descriptor_kernel[(2,)](x, out, STEP=2)


@pytest.mark.parametrize("argument", ["x", "out"])
def test_a_descriptor_larger_than_its_tensor(argument):
    descriptors = {name: tensor_descriptor(torch.zeros(8, 4)[:6], (4, 4)) for name in ("x", "out")}
    descriptors[argument].shape = [8, 4]
    with pytest.raises(ShadowMemoryError, match=rf"^descriptor_kernel: .* {argument} at offset 24, outside"):
        descriptor_kernel[(2,)](*descriptors.values(), STEP=4)


def test_atomics_are_refused():
    with pytest.raises(ShadowMemoryError, match=r"^atomic_kernel: atomics"):
        atomic_kernel[(1,)](torch.zeros(1))
