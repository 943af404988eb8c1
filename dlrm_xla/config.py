"""Every setting of a run, and where its value came from.

Flags win over the configuration file, the file over the preset, the preset over the defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from dlrm_xla.errors import UserError, choices
from dlrm_xla.presets import PRESETS
from dlrm_xla.registry import type_name

RowKernels = Literal["own", "fbgemm"]
RowOptimizerName = Literal["sgd", "adagrad", "adagrad_element", "adam"]
PLACEMENTS = ("matmul", "dense", "sparse")
SHARDINGS = ("table_wise", "row_wise", "column_wise", "data_parallel")
DenseOptimizerName = Literal["sgd", "adagrad", "adam"]


def _setting(default: Any, help: str, *, flag: bool = True) -> Any:
    metadata = {"help": help, "flag": flag}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Config:
    """The resolved settings of one run. Those with ``flag`` in their metadata are flags of ``launch/run.py``."""

    device: Literal["cpu", "cuda", "xla", "tpu"] = _setting("cpu", "where the run takes place")
    plugin: str = _setting("exact", "what replaces the tables: exact, NAME, NAME:key=value,key=value or NAME+NAME")
    data: str = _setting(
        "",
        "raw Criteo or Avazu log (plain or .gz), or a folder that python -m dlrm_xla_data prepare made; none: rows "
        "that are drawn",
    )
    data_cache: str = _setting("", "folder for the prepared copy of a raw log; none: beside the log")
    out: str = _setting("", "run folder to create; none: a fresh one under runs/")
    preset: str = _setting("small", "settings to start from: " + ", ".join(sorted(PRESETS)))
    epochs: int = _setting(1, "passes over the training rows")
    batch_size: int = _setting(512, "samples per step")
    seed: int = _setting(0, "seed of the initial values and of the order of rows")
    min_rows: int = _setting(
        1000, "tables with fewer rows than this stay exact, unless --ratio or --memory sizes the plugin"
    )
    min_count: int = _setting(0, "ids seen less often than this in training share the row of missing ids; 0 keeps all")
    ratio: float = _setting(
        0.0,
        "size the plugin so that all tables keep 1/RATIO of the exact bytes over all ids seen; 0: as its options say",
    )
    precision: Literal["fp32", "bf16"] = _setting(
        "fp32", "bf16 runs matrix products under autocast; parameters stay fp32"
    )
    memory: str = _setting(
        "",
        "bytes that the tables and their training may take, like 16GB; sizes a plugin whose size is not given; none: "
        "the device's",
    )
    dim: int = _setting(16, "width of an embedding row")
    dense_optimizer: DenseOptimizerName = _setting("adam", "optimizer of MLPs and of plugins' own parameters")
    dense_lr: float = _setting(0.001, "its learning rate")
    plugin_lr: float = _setting(0.0, "that of plugins' own parameters, such as cores and codebooks; 0: the same")
    row_optimizer: RowOptimizerName = _setting(
        "adagrad", "optimizer of table rows: adagrad is row-wise, adam lazy; rows not looked up stay as they are"
    )
    row_lr: float = _setting(0.02, "its learning rate")
    warmup_steps: int = _setting(0, "learning rates rise linearly over the first steps")
    decay_start: int = _setting(0, "step at which polynomial decay of the learning rates begins")
    decay_steps: int = _setting(0, "steps over which they decay to zero; 0: no decay")
    patience: int = _setting(2, "stop after so many validations without a lower log loss; 0: never")
    log_every: int = _setting(50, "steps between log lines, the only steps at which the host reads the device")
    evals_per_epoch: int = _setting(1, "validations per epoch")
    save_every: int = _setting(
        0, "steps between checkpoints, beside those of validations; 0: by time, see save_minutes"
    )
    synthetic_rows: int = _setting(100_000, "rows of the synthetic data that stand in when there is no --data")
    tables: dict[str, str] = _setting({}, "plugins of single tables by name", flag=False)
    bottom: list[int] = _setting([512, 256, 64], "hidden widths of the bottom MLP", flag=False)
    top: list[int] = _setting([512, 256], "hidden widths of the top MLP", flag=False)
    interaction: Literal["dot", "cat", "dcn"] = _setting("dot", "how vectors meet", flag=False)
    cross_layers: int = _setting(3, "layers of the dcn interaction", flag=False)
    cross_rank: int = _setting(512, "rank of the dcn interaction", flag=False)
    row_precision: Literal["fp32", "bf16"] = _setting(
        "fp32", "type of the tables; bf16 rounds each update up or down at random", flag=False
    )
    cuda_graphs: Literal["on", "off"] = _setting(
        "on", "record steps as CUDA graphs on --device cuda; off: queue their operations one by one"
    )
    row_kernels: RowKernels = _setting(
        "own", "who looks rows up and updates them on cpu: own, or FBGEMM's kernels (docs/architecture.md)", flag=False
    )
    row_files: str = _setting(
        "", "folder for tables larger than memory, mapped from there, those of 64 MiB and more; cpu only", flag=False
    )
    placement: dict[str, str] = _setting({}, "matmul, dense or sparse for single tables by name", flag=False)
    sharding: dict[str, str] = _setting(
        {}, "how several ranks share single tables, by name: " + ", ".join(SHARDINGS) + "; none: planned", flag=False
    )
    rank_patience: float = _setting(
        40.0, "seconds without a sign of a rank after which all others stop, naming it", flag=False
    )
    matmul_rows: int = _setting(-1, "tables up to this are placed as matmul; -1: the device's own", flag=False)
    dense_rows: int = _setting(-1, "tables up to this are placed as dense; -1: the device's own", flag=False)
    near_bytes: int = _setting(
        -1, "bytes of small tables that a TPU is to keep on the chip; -1: the device's own", flag=False
    )
    codebook_rows: int = _setting(
        -1, "plugins' arrays up to this are multiplied with one-hot ids; -1: the device's own", flag=False
    )
    micro_batches: int = _setting(1, "parts of a batch whose gradients are accumulated", flag=False)
    row_weight_decay: float = _setting(0.0, "L2 on the rows that a step looks up", flag=False)
    row_state: Literal["fp32", "bf16"] = _setting("fp32", "type of the row optimizer's state", flag=False)
    save_minutes: float = _setting(10.0, "minutes between checkpoints where save_every is 0", flag=False)
    keep_checkpoints: int = _setting(2, "checkpoints to keep beside the best", flag=False)
    decay_power: float = _setting(2.0, "power of the polynomial decay", flag=False)
    synthetic_tables: list[int] = _setting([], "rows of each synthetic table", flag=False)
    synthetic_bags: list[int] = _setting([], "ids per bag of each synthetic table; none: one each", flag=False)
    synthetic_variable: bool = _setting(
        False, "synthetic bags vary in length, and synthetic_bags are the most of each", flag=False
    )


_POSITIVE = (
    "epochs",
    "batch_size",
    "dim",
    "log_every",
    "evals_per_epoch",
    "synthetic_rows",
    "micro_batches",
    "keep_checkpoints",
    "cross_layers",
    "cross_rank",
)
_NOT_NEGATIVE = (
    "seed",
    "min_rows",
    "min_count",
    "warmup_steps",
    "decay_start",
    "decay_steps",
    "patience",
    "save_every",
)


def resolve(flags: Mapping[str, Any], file: Path | None, source: str = "flag") -> tuple[Config, dict[str, str]]:
    """The configuration and, for each setting, its origin: default, preset NAME, the file's name, or ``source``."""
    from_file = _read(file) if file else {}
    # A run's own config.yaml has the folder of that run, where no other run may go.
    if isinstance(from_file.get("out"), _Resolved):
        del from_file["out"]
    from_file = {k: v.value if isinstance(v, _Resolved) else v for k, v in from_file.items()}
    preset = str(flags.get("preset", from_file.get("preset", "small")))
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}; {choices(preset, PRESETS)}")
    values: dict[str, Any] = {}
    origins = {f.name: "default" for f in dataclasses.fields(Config)}
    for origin, layer in (
        (f"preset {preset}", PRESETS[preset].settings),
        (str(file), from_file),
        (source, flags),
    ):
        for key, value in layer.items():
            values[key] = checked(key, value, origin)
            origins[key] = origin
    config = Config(**values)
    if config.ratio and not config.ratio >= 1:  # nan too
        raise UserError(
            f"ratio is {config.ratio:g} ({origins['ratio']}), but must be at least 1: exact bytes over those to keep"
        )
    for name in _POSITIVE + _NOT_NEGATIVE:
        least = 1 if name in _POSITIVE else 0
        if getattr(config, name) < least:
            raise UserError(f"{name} is {getattr(config, name)} ({origins[name]}), but must be at least {least}")
    for name in ("plugin_lr", "row_weight_decay"):
        if not 0 <= getattr(config, name) < float("inf"):
            raise UserError(f"{name} is {getattr(config, name)} ({origins[name]}), but must be 0 or a number above it")
    for name in ("dense_lr", "row_lr", "save_minutes", "rank_patience", "decay_power"):
        if not 0 < getattr(config, name) < float("inf"):
            raise UserError(f"{name} is {getattr(config, name)} ({origins[name]}), but must be a number above 0")
    if config.decay_steps and config.decay_start < config.warmup_steps:
        raise UserError(
            f"decay_start is {config.decay_start} ({origins['decay_start']}), but learning rates still rise until "
            f"warmup_steps, {config.warmup_steps}. Let decay_start be at least that."
        )
    if config.seed >= 2**32:
        raise UserError(f"seed is {config.seed} ({origins['seed']}), but must be below 2^32")
    if not config.plugin.strip():
        raise UserError(f"plugin is empty ({origins['plugin']}); write exact, or a plugin of --list-plugins")
    if config.batch_size % config.micro_batches:
        raise UserError(
            f"batch_size {config.batch_size} does not split into {config.micro_batches} equal micro_batches"
        )
    for name, placement in config.placement.items():
        if placement not in PLACEMENTS:
            raise UserError(f"placement of table {name} cannot be {placement!r}; {choices(placement, PLACEMENTS)}")
    for name, sharding in config.sharding.items():
        if sharding not in SHARDINGS:
            raise UserError(f"sharding of table {name} cannot be {sharding!r}; {choices(sharding, SHARDINGS)}")
    if not config.synthetic_tables and not config.data:
        raise UserError(
            f"synthetic_tables is empty ({origins['synthetic_tables']}); name the rows of each table, or give --data"
        )
    if config.synthetic_bags and len(config.synthetic_bags) != len(config.synthetic_tables):
        raise UserError(
            f"synthetic_bags has {len(config.synthetic_bags)} numbers for {len(config.synthetic_tables)} tables"
        )
    return config, origins


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read the configuration {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold lines of the form 'name: value'")
    # A run's own config.yaml has {value, origin} for each setting and can be given back as it is.
    return {
        str(k): _Resolved(v["value"]) if isinstance(v, dict) and set(v) == {"value", "origin"} else v
        for k, v in content.items()
    }


class _Resolved(NamedTuple):
    value: Any


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(Config)


def checked(key: str, value: Any, origin: str) -> Any:
    """A setting's value in its type; UserError where the name or the type is not one."""
    hints = _hints()
    if key not in hints:
        raise UserError(f"there is no setting {key!r} ({origin}); {choices(key, hints)}")
    kind = hints[key]
    if typing.get_origin(kind) is Literal:
        good = value in typing.get_args(kind)
    elif kind is float:
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
            value = float(value)  # which YAML takes for text, without a point or a sign
        good = isinstance(value, int | float) and not isinstance(value, bool)
    elif kind is int:
        good = isinstance(value, int) and not isinstance(value, bool)
    elif kind == list[int]:
        good = isinstance(value, list) and all(isinstance(v, int) and v > 0 for v in value)
    elif kind == dict[str, str]:
        good = isinstance(value, dict) and all(isinstance(text, str) for item in value.items() for text in item)
    else:
        good = isinstance(value, kind)
    if not good:
        takes = f"{type_name(kind)} of numbers from 1 on" if kind == list[int] else type_name(kind)
        raise UserError(f"{key} cannot be {value!r} ({origin}); it takes {takes}")
    return float(value) if kind is float else value
