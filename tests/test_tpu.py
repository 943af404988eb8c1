"""The storage model, the chips and the lower bound: by hand, and against facts of libtpu's compiler."""

import pytest
import torch

from dlrm_xla import tpu
from dlrm_xla.errors import UserError


@pytest.mark.parametrize(
    ("shape", "dtype", "bytes"),
    [
        ((1000, 128), torch.float32, 1000 * 512),
        ((1001, 128), torch.float32, 1008 * 512),
        ((1000, 16), torch.float32, 16 * 1024 * 4),  # transposed: 1000 rows along lanes
        ((3, 16), torch.float32, 4 * 512),
        ((3, 16), torch.bfloat16, 4 * 256),
        ((1, 128), torch.int8, 4 * 128),
        ((1000, 16), torch.int64, 2 * 16 * 1024 * 4),
        ((3, 4, 130), torch.bfloat16, 3 * 4 * 256 * 2),
        ((130, 3, 4), torch.float32, 3 * 4 * 256 * 4),
        ((5,), torch.float32, 512),
        ((5,), torch.bfloat16, 512),
        ((2000,), torch.float32, 8192),
        ((), torch.int32, 512),
    ],
)
def test_arrays_take_whole_tiles(shape, dtype, bytes):
    assert tpu.storage_bytes(shape, dtype) == bytes


def test_a_chip_is_found_or_the_list_is_given():
    assert tpu.find_chip("v5e").clock_hz == 1.5e9
    with pytest.raises(UserError, match=r"no chip 'v5'; did you mean 'v5p'.*known are: tpu7x, v4, v5e, v5p, v6e"):
        tpu.find_chip("v5")


@pytest.mark.parametrize("chip", tpu.CHIPS.values(), ids=tpu.CHIPS)
def test_a_chips_clock_is_its_peak_over_flops_a_cycle(chip):
    flops_a_cycle = {"v4": 2**17, "v5e": 2**17, "v5p": 2**17, "v6e": 2**19, "tpu7x": 2**19}[chip.name]
    assert chip.bf16_flops / (chip.tensor_cores * flops_a_cycle) == pytest.approx(chip.clock_hz, rel=0.005)


def test_lower_bound_by_hand():
    chip = tpu.find_chip("v5e")
    kaggle = [tpu.Touched(26 * 2048, 16)]
    step = tpu.lower_bound(chip, kaggle, other_bytes=1000, flops=1e9)
    assert step.bytes == 26 * 2048 * 512 * 3 + 1000  # read, read again and written
    assert step.memory_seconds == pytest.approx(81_789_928 / 819e9)
    assert step.matrix_seconds == pytest.approx(1e9 / 197e12)
    assert step.seconds == step.memory_seconds
    assert tpu.lower_bound(chip, kaggle, flops=1e12).seconds == pytest.approx(1e12 / 197e12)
    assert tpu.lower_bound(chip, kaggle, training=False).bytes == 26 * 2048 * 512
    adagrad = tpu.Touched(10, 200, row_states=1)
    assert adagrad.step_bytes == 10 * (3 * 1024 + 2 * 512)
    assert tpu.Touched(10, 200, states=2).step_bytes == 10 * 7 * 1024
