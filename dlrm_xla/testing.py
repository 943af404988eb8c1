"""The contract as tests. A plugin's package subclasses `BagContract` in three lines:

class TestMine(BagContract):
    plugin = "mine"
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dlrm_xla import registry
from dlrm_xla.contract import FromTable, Refreshed, Size, Table
from dlrm_xla.devices import open_device
from dlrm_xla.errors import UserError
from dlrm_xla.export import store
from dlrm_xla.plan import bytes_kept
from dlrm_xla.refresh import refresh
from dlrm_xla.registry import Layer
from dlrm_xla.row_rules import RowSettings
from dlrm_xla.row_store import RowStore
from dlrm_xla.rows import RowTable
from dlrm_xla.shapes import shapes_alone
from dlrm_xla.sizing import with_size
from dlrm_xla.trained_rows import TrainedRows
from dlrm_xla.xla_device import open_xla_first

# Tests of one process share it, and torch_xla must come before the first backward.
HAS_XLA = open_xla_first()
_NEEDS_XLA = pytest.mark.skipif(not HAS_XLA, reason="torch_xla is not installed")


class BagContract:
    """What every bag must do, whatever mathematics is inside.

    ``plugin`` is a spec as on the command line. ``table`` should be large enough that the plugin makes it smaller.
    ``distinct_share``: of consecutive ids, how many have vectors of their own at the least.
    """

    plugin: ClassVar[str] = registry.EXACT
    table: ClassVar[Table] = Table("contract", 4999, 16)
    distinct_share: ClassVar[float] = 0.9
    tolerance: ClassVar[float] = 1e-5

    def make(self, table: Table | None = None) -> nn.Module:
        """A fresh bag, the same each time."""
        torch.manual_seed(7)
        return registry.compose(registry.parse(self.plugin), RowTable)(table or self.table)

    def inputs(self, batch: int = 32, length: int = 3) -> tuple[Tensor, Tensor]:
        """Ids with many duplicates and both ends of the table, weights with padded slots."""
        rng = np.random.default_rng(5)
        ids = rng.integers(0, self.table.num_rows, (batch, length)).astype(np.int32)
        ids[:4] = ids[4]
        ids[5, 0], ids[6, 0] = 0, self.table.num_rows - 1
        weights = rng.uniform(0.5, 2, (batch, length)).astype(np.float32)
        weights[::3, -1] = 0
        return torch.from_numpy(ids), torch.from_numpy(weights)

    def dense_twin(self, bag: nn.Module, num_rows: int | None = None) -> Tensor:
        """The table that the bag stands for, [rows, dim]: each id looked up by itself."""
        with torch.no_grad():
            ids = torch.arange(num_rows or self.table.num_rows, dtype=torch.int32).unsqueeze(1)
            twin: Tensor = bag(ids, torch.ones(ids.shape))
            return twin

    def _either(self, wanted: Table, instead: Table) -> Table:
        """``wanted``, or ``instead`` where the plugin refuses it."""
        try:
            with shapes_alone():
                self.make(wanted)
        except ValueError:
            return instead
        return wanted

    def _large(self) -> Table:
        """A table of ids beyond 2^24, narrow where the plugin takes it, for it may hold all rows."""
        large = Table("large", 2**24 + 4096, self.table.dim)
        return self._either(replace(large, dim=min(8, large.dim)), large)

    def test_shape_and_type(self) -> None:
        for length in (1, 3):
            out = self.make()(*self.inputs(length=length))
            assert out.shape == (32, self.table.dim), f"bags of {length} give {tuple(out.shape)}"
            assert out.dtype == torch.float32

    def test_equals_its_dense_twin(self) -> None:
        bag = self.make()
        ids, weights = self.inputs()
        expected = (self.dense_twin(bag)[ids.long()] * weights.unsqueeze(-1)).sum(1)
        torch.testing.assert_close(bag(ids, weights), expected, atol=self.tolerance, rtol=1e-4)

    def test_is_linear_in_weights(self) -> None:
        bag = self.make()
        ids, weights = self.inputs()
        other = torch.rand_like(weights)
        torch.testing.assert_close(
            bag(ids, 2 * weights + 3 * other),
            2 * bag(ids, weights) + 3 * bag(ids, other),
            atol=self.tolerance,
            rtol=1e-4,
        )

    def test_ignores_padding(self) -> None:
        bag = self.make()
        ids, weights = self.inputs()
        moved = torch.where(weights == 0, (ids + 1) % self.table.num_rows, ids)
        assert not torch.equal(moved, ids)
        torch.testing.assert_close(bag(moved, weights), bag(ids, weights), atol=0, rtol=0)

    def test_large_ids_stay_distinct(self) -> None:
        """Float arithmetic on ids merges neighbours beyond 2^24."""
        bag = self.make(self._large())
        ids = torch.arange(2**24 + 1, 2**24 + 257, dtype=torch.int32).unsqueeze(1)
        with torch.no_grad():
            rows = bag(ids, torch.ones(ids.shape)).numpy()
        distinct = len(np.unique(rows, axis=0))
        assert distinct >= self.distinct_share * len(ids), f"{len(ids)} ids beyond 2^24 share {distinct} vectors"

    @_NEEDS_XLA
    def test_large_ids_find_their_rows_on_xla(self) -> None:
        """torch_xla divides integers as float32; `dlrm_xla.ids.divide_ids` does not."""
        bag = self.make(self._large())
        ids = torch.arange(2**24 + 1, 2**24 + 257, dtype=torch.int32).unsqueeze(1)
        ones = torch.ones(ids.shape)
        device = open_device("xla")
        with torch.no_grad():
            expected = bag(ids, ones)
            moved = bag.to(device.torch_device)
            found = moved(ids.to(device.torch_device), ones.to(device.torch_device)).cpu()
        torch.testing.assert_close(found, expected, atol=self.tolerance, rtol=1e-4)

    def test_every_parameter_gets_a_gradient(self) -> None:
        bag = self.make()
        out = bag(*self.inputs(batch=256))
        torch.autograd.backward((out * torch.randn_like(out)).sum())
        for name, parameter in bag.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} gets no gradient"
                assert parameter.grad.abs().sum() > 0, f"the gradient of {name} is zero"

    def test_trains_under_autocast(self) -> None:
        """As ``--precision bf16`` runs it: gradients point where those of float32 do."""
        found = []
        for bf16 in (False, True):
            bag = self.make()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                out = bag(*self.inputs(batch=256))
            torch.manual_seed(9)
            torch.autograd.backward((out.float() * torch.randn(out.shape)).sum())
            found.append({n: p.grad.float().flatten() for n, p in bag.named_parameters() if p.grad is not None})
        for name, grad in found[0].items():
            cosine = torch.nn.functional.cosine_similarity(grad, found[1][name], dim=0).item()
            assert cosine > 0.99, f"the gradient of {name} under autocast has the cosine {cosine:.3f} to float32's"

    def test_starts_with_the_variance_of_exact_rows(self) -> None:
        std = self.dense_twin(self.make()).std().item()
        assert 0.8 < std / self.table.start_std < 1.25, (
            f"rows start with {std:.2e}, exact ones {self.table.start_std:.2e}"
        )

    def test_trains_in_the_row_store_as_by_autograd(self) -> None:
        """Rows handed to the row store are updated as autograd through the whole table updates them."""
        outs = []
        for stored in (False, True):
            model = nn.Module()
            model.bag = self.make()
            store = RowStore(model, open_device("cpu"), RowSettings("sgd"), 0.1) if stored else None
            own = list(model.parameters())
            dense = torch.optim.SGD(own, lr=0.1) if own else None
            for shift in range(3):
                ids, weights = (t.roll(shift, 0) for t in self.inputs())
                out = model.bag(ids, weights)
                for parameter in own:
                    parameter.grad = None
                torch.autograd.backward((out - 1).square().mean())
                if dense:
                    dense.step()
                if store:
                    store.step()
            model.eval()
            outs.append(model.bag(*self.inputs()).detach())
        torch.testing.assert_close(outs[1], outs[0], atol=self.tolerance, rtol=1e-4)

    def test_a_lookup_changes_nothing(self) -> None:
        """Several ranks run the bags twice a step; `dlrm_xla.contract.Refreshed` is for what changes."""
        bag = self.make().train()
        kept = {name: tensor.clone() for name, tensor in bag.state_dict().items()}
        torch.autograd.backward(bag(*self.inputs()).sum())
        for name, tensor in bag.state_dict().items():
            assert torch.equal(tensor, kept[name]), f"{name} is another after a lookup: change it in refresh()"

    def test_a_refresh_depends_on_the_state_alone(self) -> None:
        """Where bags are `Refreshed`: shapes, types and Parameters stay, and a copy of the bag comes to the same."""
        bag = self.make()
        if not any(isinstance(module, Refreshed) for module in bag.modules()):
            return
        states = []
        for seed, one in enumerate((bag, copy.deepcopy(bag))):
            torch.manual_seed(seed)
            for module in one.modules():
                if isinstance(module, Refreshed):
                    refresh(module, self.table.name)
            states.append(one.state_dict())
        for name, tensor in states[0].items():
            assert torch.equal(tensor, states[1][name]), f"from the same state refresh() makes another {name}"

    def test_padding_is_not_looked_up(self) -> None:
        """Weight decay moves the rows that a step looks up, and padding looks up none."""
        found = []
        for padded in (0, 256):
            model = nn.Module()
            model.bag = self.make()
            store = RowStore(model, open_device("cpu"), RowSettings("sgd", weight_decay=1.0), 0.1)
            ids, weights = self.inputs(batch=8)
            ids = torch.cat([ids, torch.arange(3 * padded, dtype=torch.int32).view(padded, 3)])
            torch.autograd.backward(model.bag(ids, torch.cat([weights, torch.zeros(padded, 3)]))[:8].sum())
            store.step()
            found.append({name: rows.clone() for name, rows in store.tables()})
        for name, rows in found[0].items():
            moved = (found[1][name] != rows).any(1).sum().item()
            assert moved == 0, f"{moved} rows of {name} were looked up by padding: give it a weight of 0"

    def test_state_dict_round_trip(self) -> None:
        bag = self.make()
        torch.manual_seed(8)
        other = registry.compose(registry.parse(self.plugin), RowTable)(self.table)
        ids, weights = self.inputs()
        assert not torch.equal(other(ids, weights), bag(ids, weights))
        other.load_state_dict(bag.state_dict())
        assert torch.equal(other(ids, weights), bag(ids, weights))

    def test_moves_to_a_device_whole(self) -> None:
        bag = self.make().to("meta")
        ids, weights = self.inputs()
        assert bag(ids.to("meta"), weights.to("meta")).device.type == "meta"
        kept = [*bag.parameters(), *bag.buffers()]
        assert all(t.device.type == "meta" for t in kept)

    def test_shapes_do_not_depend_on_the_data(self) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode(allow_non_fake_inputs=False) as mode:
            bag = self.make()
            ids, weights = (mode.from_tensor(t) for t in self.inputs())
            assert bag(ids, weights).shape == (len(ids), self.table.dim)

    def test_exports_for_any_batch_size(self) -> None:
        bag = self.make().eval().requires_grad_(False)
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(bag, self.inputs(), dynamic_shapes=({0: batch}, {0: batch})).module()
        ids, weights = self.inputs(batch=7)
        torch.testing.assert_close(program(ids, weights), bag(ids, weights), atol=self.tolerance, rtol=1e-4)

    def test_is_smaller_than_exact_or_refuses(self) -> None:
        if not registry.parse(self.plugin):
            assert bytes_kept(self.make()) == self.table.num_rows * self.table.dim * 4
            return
        exact = self.table.num_rows * self.table.dim * 4
        try:
            kept = bytes_kept(self.make())
        except ValueError:
            return
        assert kept < exact, f"{self.plugin} keeps {kept:,} bytes, exact rows {exact:,}"

    def test_is_stored_in_the_bytes_that_are_counted(self) -> None:
        """Of a bag that is `Stored`, or has one inside: what is served holds those bytes and gives the same lookups."""
        bag = self.make().eval()
        if not any(hasattr(module, "bytes_to_serve") for module in bag.modules()):
            return
        ids, weights = self.inputs()
        expected, counted = bag(ids, weights), bytes_kept(bag)
        model = nn.Module()
        model.bag = bag
        store(model)
        held = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
        assert sum(held.values()) == counted, f"{counted:,} bytes are counted, {sum(held.values()):,} served"
        torch.testing.assert_close(model.bag(ids, weights), expected, atol=self.tolerance / 100, rtol=1e-5)

    def test_a_later_size_keeps_no_less(self) -> None:
        """The order of values that `dlrm_xla.contract.sized` asks for, of each plugin around exact tables.

        For few rows with the plugin's defaults: with other options what a bag keeps besides rows may weigh more there.
        """
        for layer in registry.parse(self.plugin):
            size: Size | None = getattr(registry.load(layer.name), "size", None)
            if size is None:
                continue
            for num_rows, of in ((self.table.num_rows, layer), (min(50, self.table.num_rows), Layer(layer.name))):
                table = replace(self.table, num_rows=num_rows)
                values = size.values(table, **of.options)
                kept = {}
                for value in [values[k * (len(values) - 1) // 12] for k in range(13)] if len(values) else []:
                    make = registry.compose(with_size([of], 0, size, value), RowTable)
                    with contextlib.suppress(ValueError), shapes_alone():
                        kept[value] = bytes_kept(make(table))
                assert list(kept.values()) == sorted(kept.values()), (
                    f"{layer.name} keeps by {size.option}, for {num_rows:,} rows, these bytes: {kept}"
                )

    def test_takes_over_a_table(self) -> None:
        """Where the bag is `FromTable`: rows that it could stand for, three times those that it starts with."""
        table = self._either(replace(self.table, num_rows=min(600, self.table.num_rows)), self.table)
        falling = (2 * table.num_rows // 3 - torch.arange(table.num_rows)).clamp(min=0)
        for lookups in (None, falling, torch.zeros(table.num_rows)):
            bag = self.make(table)
            if not isinstance(bag, FromTable):
                return
            rows = 3 * self.dense_twin(bag, table.num_rows)
            try:
                bag.set_table(TrainedRows.of(rows, lookups))
            except UserError:  # not with these options, or not what stands behind
                return
            found = self.dense_twin(bag, table.num_rows)
            assert found.shape == rows.shape
            assert found.isfinite().all(), "rows that were taken over are not finite"
            weight_R1 = torch.ones(1) if lookups is None or not lookups.any() else lookups.sqrt().unsqueeze(1)
            error = ((found - rows) * weight_R1).norm() / (rows * weight_R1).norm()
            assert error < 0.5, f"a table that the bag can stand for is taken over with an error of {error:.0%}"

    def test_bad_options_name_the_good_ones(self) -> None:
        for layer in registry.parse(self.plugin):
            good: Mapping[str, Any] = registry.options_of(registry.load(layer.name))
            with pytest.raises(UserError, match="no_such_option") as error:
                registry.parse(f"{layer.name}:no_such_option=1")
            assert all(name in str(error.value) for name in good)

    @_NEEDS_XLA
    def test_is_one_graph_on_xla_without_fallbacks(self) -> None:
        device = open_device("xla")
        bag = self.make()
        ids, weights = self.inputs()
        expected = bag(ids, weights)
        torch.autograd.backward(expected.square().sum())
        gradients = {n: p.grad for n, p in bag.named_parameters() if p.grad is not None}
        moved = device.place(self.make())

        def step(ids: Tensor, weights: Tensor) -> list[Tensor]:
            out: Tensor = moved(ids, weights)
            trained = dict(moved.named_parameters())
            grads = torch.autograd.grad(out.square().sum(), [trained[name] for name in gradients])
            return [out.detach(), *grads]

        before = device.counters()
        compiled = device.compile(step, f"contract {self.plugin}")
        for repeat in range(3):
            # Other ids of the same shape must not compile again.
            out, *grads = compiled(
                ids.roll(repeat, 0).to(device.torch_device), weights.roll(repeat, 0).to(device.torch_device)
            )
            torch.testing.assert_close(out.cpu().roll(-repeat, 0), expected.detach(), atol=self.tolerance, rtol=1e-4)
        after = device.counters()
        assert after.compiles - before.compiles <= 1, f"compiled {after.compiles - before.compiles} graphs"
        assert after.fallbacks == before.fallbacks, f"ran on the CPU: {after.fallbacks}"
        for grad, expected_grad in zip(grads, gradients.values(), strict=True):
            torch.testing.assert_close(grad.cpu(), expected_grad, atol=1e-4, rtol=1e-3)
