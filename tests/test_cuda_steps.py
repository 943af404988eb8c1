"""Steps recorded as CUDA graphs; all of it needs a GPU."""

import pytest
import torch
from conftest import needs_cuda

from dlrm_xla.cuda_steps import CapturedStep
from dlrm_xla.errors import UserError

pytestmark = needs_cuda


def test_a_recorded_step_reads_its_arguments_and_writes_in_place():
    total = torch.zeros(1, device="cuda")

    def step(pair, rate):
        total.add_(pair[0].sum() * rate)
        return pair[0] * rate

    run, expected, found = CapturedStep(step, "adding"), 0.0, []
    for k in range(8):
        found.append(run((torch.full((2,), float(k), device="cuda"), torch.zeros(1, device="cuda")), rate=0.5))
        expected += k
    assert run._graph is not None
    assert total.item() == expected
    assert [f[0].item() for f in found] == [0.5 * k for k in range(8)], "results outlive the next call"
    run((torch.ones(2, device="cuda"), torch.zeros(1, device="cuda")), rate=0.25)
    assert total.item() == expected + 0.5, "another rate is another step"
    run((torch.ones(3, device="cuda"), torch.zeros(1, device="cuda")), rate=0.25)
    assert total.item() == expected + 1.25, "and so is another shape"


def test_what_was_put_elsewhere_is_found_once_the_step_was_told():
    factor, one = torch.full((1,), 2.0, device="cuda"), torch.ones(1, device="cuda")
    run = CapturedStep(lambda x: x * factor, "times")
    for _ in range(6):
        assert run(one).item() == 2
    factor.data = torch.full((1,), 3.0, device="cuda")
    run.forget()
    for _ in range(6):
        assert run(one).item() == 3
    assert run._graph is not None


def test_a_step_that_asks_the_device_is_refused_with_a_way_on():
    run = CapturedStep(lambda x: x * x.sum().item(), "asking")
    for _ in range(3):
        run(torch.ones(1, device="cuda"))
    with pytest.raises(UserError, match=r"the asking step cannot be recorded as a CUDA graph: .*--cuda-graphs off"):
        run(torch.ones(1, device="cuda"))
    torch.cuda.synchronize()
    assert torch.ones(2, device="cuda").sum().item() == 2
