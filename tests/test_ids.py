"""Ids divide exactly, on xla too."""

import pytest
import torch
from conftest import EVERY_DEVICE

from dlrm_xla.devices import open_device
from dlrm_xla.ids import divide_ids


@pytest.mark.parametrize("device", EVERY_DEVICE)
@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 8, 342, 4099, 65_537, 2**24 + 1, 2**30 - 1, 2**30])
def test_quotients_equal_pythons(device, divisor):
    where = open_device(device).torch_device
    generator = torch.Generator().manual_seed(divisor)
    near = (torch.randint(0, (2**31 - 1) // divisor + 1, (3000,), generator=generator) * divisor).repeat(3)
    near += torch.tensor([-1, 0, 1]).repeat_interleave(3000)
    ids = torch.cat([near.clamp(0, 2**31 - 1), torch.tensor([0, 1, 2**24, 2**24 + 1, 2**31 - 2, 2**31 - 1])])
    quotients = divide_ids(ids.int().to(where), divisor).cpu()
    assert quotients.dtype == torch.int32
    assert quotients.tolist() == [i // divisor for i in ids.tolist()]
