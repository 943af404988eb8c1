"""The rows' optimizers: what each adds to rows whose whole gradients are known.

g is a touched row's gradient with its weight decay, summed over the row's lookups of a step; t counts steps from 1.

    sgd                 -lr g
    adagrad             G += mean(g^2), a number for each row;  -lr g / (sqrt(G) + eps)
    adagrad_element     G += g^2, element by element;           -lr g / (sqrt(G) + eps)
    adam, lazy          m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
                        -lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)

Rows that a step does not look up keep what they have, state included. Duchi, Hazan, Singer 2011, "Adaptive Subgradient
Methods for Online Learning and Stochastic Optimization", section 1.1, for Adagrad, with one number a row as in FBGEMM's
exact row-wise Adagrad; Kingma & Ba 2015, "Adam", end of section 2, with eps where torch.optim.SparseAdam has it: added
before the bias of v is taken out, not after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dlrm_xla.config import RowOptimizerName
from dlrm_xla.device import Device
from dlrm_xla.errors import UserError, choices
from dlrm_xla.one_hot import matmul_parts

StateName = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class RowSettings:
    """Numbers of a row optimizer.

    ``eps`` is added to the root that a step is divided by, ``betas`` are Adam's b1 and b2, ``weight_decay`` is L2,
    added to the gradient of touched rows only, ``state`` the type of the state.
    """

    name: RowOptimizerName = "adagrad"
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    state: StateName = "fp32"

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UserError(f"there is no row optimizer {self.name!r}; {choices(self.name, RULES)}")
        if self.state not in get_args(StateName):
            raise UserError(
                f"state of a row optimizer cannot be {self.state!r}; {choices(self.state, get_args(StateName))}"
            )

    @property
    def only_adds(self) -> bool:
        """Whether what is added to a row depends on its gradient alone, and linearly."""
        return self.name == "sgd" and self.weight_decay == 0


class Lines(NamedTuple):
    """How rows lie in lines: ``pack`` rows of ``dim`` side by side in ``width`` columns, or each by itself."""

    pack: int = 1
    dim: int = 0
    width: int = 0
    device: Device | None = None

    def mean(self, values_LW: Tensor) -> Tensor:
        """Each row's mean [lines pack], by a product with ones: a TPU would lay lines cut into rows out anew."""
        if self.pack == 1:
            return (values_LW if self.dim == self.width else values_LW[:, : self.dim]).mean(1)
        assert self.device is not None
        picks_WP = self._picks(values_LW)
        parts = [part @ picks_WP for part in matmul_parts(values_LW, self.device)]
        return sum(parts[1:], parts[0]).reshape(-1) / self.dim

    def spread(self, numbers_R: Tensor) -> Tensor:
        """A number per row, at each of the row's columns [lines, width]; [rows, 1] where a line is one row."""
        if self.pack == 1:
            return numbers_R.unsqueeze(1)
        assert self.device is not None
        picks_WP = self._picks(numbers_R)
        parts = [part @ picks_WP.t() for part in matmul_parts(numbers_R.view(-1, self.pack), self.device)]
        return sum(parts[1:], parts[0])

    def _picks(self, like: Tensor) -> Tensor:
        column_W, row_P = (torch.arange(n, device=like.device) for n in (self.width, self.pack))
        return (column_W.unsqueeze(1) // self.dim == row_P).to(like.dtype)


class Rule(NamedTuple):
    """An optimizer for rows given with their whole gradients.

    ``states`` says for each state whether it has one number per row or per element. ``update`` maps (gradients [U, D],
    states, learning rate, step [1] from 1, settings, lines) to (what is added to the rows, new states); with several
    rows to a line, gradients and states per element are [lines, width]. ``still``: a row whose gradient is zero stays
    as it is, state included.
    """

    states: tuple[Literal["row", "element"], ...]
    update: Callable[[Tensor, list[Tensor], float, Tensor, RowSettings, Lines], tuple[Tensor, list[Tensor]]]
    still: bool


def _sgd(
    g: Tensor, states: list[Tensor], lr: float, step: Tensor, s: RowSettings, lines: Lines
) -> tuple[Tensor, list[Tensor]]:
    return g * -lr, []


def _adagrad(
    g: Tensor, states: list[Tensor], lr: float, step: Tensor, s: RowSettings, lines: Lines
) -> tuple[Tensor, list[Tensor]]:
    sum_U = states[0] + lines.mean(g.square())
    return g * lines.spread(-lr / (sum_U.sqrt() + s.eps)), [sum_U]


def _adagrad_element(
    g: Tensor, states: list[Tensor], lr: float, step: Tensor, s: RowSettings, lines: Lines
) -> tuple[Tensor, list[Tensor]]:
    sum_UD = states[0] + g.square()
    return g * -lr / (sum_UD.sqrt() + s.eps), [sum_UD]


def _adam(
    g: Tensor, states: list[Tensor], lr: float, step: Tensor, s: RowSettings, lines: Lines
) -> tuple[Tensor, list[Tensor]]:
    # The second moment is the first state: torch_xla lets XLA pair donated buffers with results of the same shape in
    # the order in which the graph meets them, and a pair that is crossed costs a copy of each.
    first, second = s.betas
    v_UD = states[0] * second + g.square() * (1 - second)
    m_UD = states[1] * first + g * (1 - first)
    # 1 - beta^t without the loss of digits that 1 - 0.999 has in float32
    bias1, bias2 = (-torch.expm1(step * math.log(beta)) for beta in s.betas)
    return m_UD * (-lr * bias2.sqrt() / bias1) / (v_UD.sqrt() + s.eps), [v_UD, m_UD]


RULES: dict[str, Rule] = {
    "sgd": Rule((), _sgd, still=True),
    "adagrad": Rule(("row",), _adagrad, still=True),
    "adagrad_element": Rule(("element",), _adagrad_element, still=True),
    "adam": Rule(("element", "element"), _adam, still=False),
}
