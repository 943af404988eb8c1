"""Named starting points, each with what it reproduces. Any setting can still be changed by file or flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """Settings and what they reproduce."""

    about: str
    settings: Mapping[str, Any]


KAGGLE_ROWS = [
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
]  # fmt: skip
TERABYTE_ROWS = [
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938, 155, 4, 976,
    14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
]  # fmt: skip
MLPERF_V2_ROWS = [
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976,
    14, 40000000, 40000000, 40000000, 590152, 12973, 108, 36,
]  # fmt: skip
MLPERF_V2_BAGS = [3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1]

PRESETS: dict[str, Preset] = {
    "small": Preset(
        "The figures of the README, on a sample of some 100,000 Criteo rows: one epoch, seconds on a laptop.",
        {
            "min_count": 4,
            "bottom": [512, 256, 64],
            "top": [512, 256],
            "evals_per_epoch": 4,
            # By validation AUC at 100x: tensorly_tt 0.737 at 0.001, 0.744 at 0.003 and 0.01, 0.731 at 0.03.
            "plugin_lr": 0.003,
            # The shape of the Kaggle tables, cut so that the demonstration runs anywhere.
            "synthetic_tables": [min(rows, 20_000) for rows in KAGGLE_ROWS],
        },
    ),
    "kaggle": Preset(
        "Criteo Kaggle as published with the reference script: one epoch, accuracy 78.7 to 78.9 %, AUC 0.8029.",
        {
            "dim": 16,
            "bottom": [512, 256, 64],
            "top": [512, 256],
            "batch_size": 128,
            "dense_optimizer": "sgd",
            "dense_lr": 0.1,
            "row_optimizer": "sgd",
            "row_lr": 0.1,
            "log_every": 1000,
            "synthetic_tables": KAGGLE_ROWS,
        },
    ),
    "terabyte": Preset(
        "MLPerf v1 on Criteo Terabyte, 40M rows at most per table: AUC 0.8025. Exact tables take 96 GB in fp32.",
        {
            "dim": 128,
            "bottom": [512, 256],
            "top": [1024, 1024, 512, 256],
            "batch_size": 2048,
            "dense_optimizer": "sgd",
            "dense_lr": 1.0,
            "row_optimizer": "sgd",
            "row_lr": 1.0,
            "log_every": 1000,
            "synthetic_tables": TERABYTE_ROWS,
        },
    ),
    "mlperf_v2": Preset(
        "MLPerf DLRM-DCNv2 on multi-hot Criteo Terabyte: AUC 0.80275. Exact tables take 105 GB in fp32.",
        {
            "dim": 128,
            "bottom": [512, 256],
            "top": [1024, 1024, 512, 256],
            "interaction": "dcn",
            "cross_layers": 3,
            "cross_rank": 512,
            "batch_size": 65536,
            "dense_optimizer": "adagrad",
            "dense_lr": 0.005,
            "row_optimizer": "adagrad",
            "row_lr": 0.005,
            "log_every": 100,
            "synthetic_tables": MLPERF_V2_ROWS,
            "synthetic_bags": MLPERF_V2_BAGS,
        },
    ),
}
