"""How the norm family's launchers split rows into tiles and tokens into programs."""

import pytest
import torch

import ddt_kernels
from ddt_kernels import norm_launch, reference
from kernel_testing import FP32
from norm_cases import make_inputs


def test_tiles_cover_every_width():
    for channels in range(1, norm_launch.MAX_CHANNELS + 1):
        for config in (norm_launch.forward_config(channels), norm_launch.backward_config(channels)):
            assert config.main <= channels <= config.main + config.tail < 2 * channels + 16
            assert config.num_warps in (1, 2, 4, 8)
            for size in (config.main, config.tail or 1):
                assert size & (size - 1) == 0
    assert norm_launch.forward_config(1152) == norm_launch.TileConfig(1024, 128, 1)
    assert norm_launch.backward_config(1152) == norm_launch.TileConfig(1024, 128, 4)


def test_registers_are_limited_where_the_compiler_would_spill_for_occupancy():
    def limit(channels, per_token, arch):
        return norm_launch.backward_register_limit(norm_launch.backward_config(channels), per_token, arch)

    assert limit(1152, False, 90) is None
    assert limit(768, False, 90) == limit(1536, False, 90) == limit(1152, False, 100) == 255
    assert limit(768, True, 90) is limit(1152, True, 100) is None


def test_backward_programs_have_enough_rows_and_no_more():
    assert norm_launch.backward_rows_per_program(128, 256) == 32  # 32K rows: 1024 programs
    assert norm_launch.backward_rows_per_program(1, 256) == 1
    assert norm_launch.backward_rows_per_program(1000, 1024) == 32
    assert norm_launch.backward_rows_per_program(5000, 12) == 16


@pytest.mark.gpu
def test_launches_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = make_inputs("rms_norm_modulate", (2, 3, 20), True, FP32, device="cuda:1")
    with torch.cuda.device(0):
        y = ddt_kernels.rms_norm_modulate(*inputs.values())
    torch.testing.assert_close(y, reference.rms_norm_modulate(*inputs.values()))
