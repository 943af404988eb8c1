"""A trained model from its checkpoint alone: to score rows, and to export it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlrm_xla import checkpoint
from dlrm_xla.batches import PackedBatch, unpack
from dlrm_xla.config import Config
from dlrm_xla.contract import MakeBag, Table
from dlrm_xla.device import Device
from dlrm_xla.errors import UserError
from dlrm_xla.model import DLRM
from dlrm_xla.plan import TablePlan
from dlrm_xla.registry import compose, parse
from dlrm_xla.row_files import LEAST_FILE_BYTES
from dlrm_xla.row_optim import DTYPES
from dlrm_xla.rows import RowTable
from dlrm_xla.shapes import shapes_alone
from dlrm_xla.tensor_file import TensorFile

_SETTINGS = ("bottom", "top", "interaction", "cross_layers", "cross_rank", "seed")


def model_settings(settings: Config | Mapping[str, Any]) -> dict[str, Any]:
    """What a `DLRM` takes of settings, or of what `describe` made of them."""
    values = settings if isinstance(settings, Mapping) else vars(settings)
    return {name: values[name] for name in _SETTINGS}


def describe(
    config: Config,
    plans: Sequence[TablePlan],
    num_dense: int,
    bag_lengths: Sequence[int],
    variable_bags: bool = False,
) -> dict[str, Any]:
    """What a checkpoint keeps so that the model can be built without its data."""
    return {
        "num_dense": num_dense,
        "bag_lengths": list(bag_lengths),
        "variable_bags": variable_bags,
        "tables": [{"name": p.name, "rows": p.rows, "dim": p.dim, "plugin": p.plugin} for p in plans],
        **model_settings(config),
    }


def build(described: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> DLRM:
    """The model that was described, with initial values."""
    return _built(described, partial(RowTable, dtype=dtype))


def _built(described: Mapping[str, Any], rows: MakeBag) -> DLRM:
    tables = [Table(t["name"], t["rows"], t["dim"]) for t in described["tables"]]
    return DLRM(
        described["num_dense"],
        tables,
        [compose(parse(t["plugin"]), rows) for t in described["tables"]],
        **model_settings(described),
    )


def build_mapped(described: Mapping[str, Any], file: TensorFile, device: Device) -> DLRM:
    """The model of a checkpoint with exact tables, whose rows stay in the file: to score with, not to train.

    Only tables below `RowFiles.least_bytes` are copied, and all on a device that has no files.
    """
    names = {t["name"]: f"model.bags.{k}.weight" for k, t in enumerate(described["tables"])}

    def rows(table: Table) -> RowTable:
        with shapes_alone():
            bag = RowTable(table)
        weight_RD = file.tensor(names[table.name])
        if weight_RD.shape != (table.num_rows, table.dim):
            raise UserError(
                f"{file.path} says that table {table.name} is {table.num_rows} x {table.dim}, but holds "
                f"{list(weight_RD.shape)}"
            )
        bag.weight = nn.Parameter(weight_RD, requires_grad=False)
        bag.file_backed = device.rows.files and weight_RD.nbytes >= LEAST_FILE_BYTES
        return bag

    model = _built(described, rows)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.startswith("bags."):
                tensor.copy_(file.tensor(f"model.{name}"))
    return model


def check_tables(described: Mapping[str, Any], rows: Sequence[int]) -> None:
    """Raises a UserError where data has other tables than the model that was described."""
    trained = [t["rows"] for t in described["tables"]]
    if list(rows) == trained:
        return
    advice = "Give --data the rows that it was trained on, and its --min-count."
    if len(rows) != len(trained):
        raise UserError(f"the model has {len(trained)} tables, the data {len(rows)}. {advice}")
    names = [t["name"] for t in described["tables"]]
    differ = [f"{n} {a:,} and {b:,}" for n, a, b in zip(names, trained, rows, strict=True) if a != b]
    raise UserError(
        f"the model's tables are not those of the data; rows there and here: {', '.join(differ[:5])}. {advice}"
    )


class Scorer(nn.Module):
    """Click probabilities [B] from dense_BI float32 and ids_BS int32, the slots of all features side by side.

    An id that its table has not counts as 0, as one of a prepared dataset does that training saw too rarely for a row.
    Where bags vary in length, slots that a bag does not fill have the id -1.
    """

    rows_S: Tensor

    def __init__(self, model: DLRM, bag_lengths: Sequence[int], variable_bags: bool = False) -> None:
        super().__init__()
        self.model = model
        self.bag_lengths = list(bag_lengths)
        self.lengths = tuple(bag_lengths) if variable_bags else None
        rows = torch.tensor([t.num_rows for t in model.tables], dtype=torch.int32)
        self.register_buffer("rows_S", rows.repeat_interleave(torch.tensor(self.bag_lengths)), persistent=False)

    def forward(self, dense_BI: Tensor, ids_BS: Tensor) -> Tensor:
        within_BS = (ids_BS < self.rows_S) & (ids_BS >= (0 if self.lengths is None else -1))
        ids_BS = torch.where(within_BS, ids_BS, 0)
        packed = PackedBatch(dense_BI, ids_BS, torch.zeros_like(dense_BI[:, 0]), lengths=self.lengths)
        batch = unpack(packed, self.bag_lengths)
        logits_B: Tensor = self.model(batch.dense_BI, batch.ids, batch.weights)
        return torch.sigmoid(logits_B)


def load(path: Path) -> tuple[Scorer, dict[str, Any]]:
    """The model of a checkpoint, on the CPU and ready to score, and what was saved about it."""
    about = checkpoint.read_about(path)
    model = build(about["model"], DTYPES[about["config"]["row_precision"]])
    checkpoint.load_model(path, model)
    described = about["model"]
    return Scorer(model, described["bag_lengths"], described.get("variable_bags", False)).eval(), about
