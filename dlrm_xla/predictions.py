"""Scores of a dataset as a Parquet file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dlrm_xla.errors import UserError

_ROWS_AT_A_TIME = 1_000_000


def write_predictions(
    path: Path, labels: NDArray[np.float32] | None, logits: NDArray[np.float32], first_row: int
) -> None:
    """Writes row (int64, place in the dataset), label (int8), logit and probability (float32), whole or not at all.

    Without ``labels`` there is no such column.
    """
    import pyarrow
    from pyarrow import parquet

    types = {"row": pyarrow.int64()} | ({} if labels is None else {"label": pyarrow.int8()})
    types |= dict.fromkeys(("logit", "probability"), pyarrow.float32())
    schema = pyarrow.schema(list(types.items()))
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with parquet.ParquetWriter(unfinished, schema) as writer:
            for first in range(0, len(logits), _ROWS_AT_A_TIME):
                part = logits[first : first + _ROWS_AT_A_TIME]
                rows = np.arange(first_row + first, first_row + first + len(part))
                probabilities = (1 / (1 + np.exp(-part.astype(np.float64)))).astype(np.float32)
                of_part = [] if labels is None else [labels[first : first + len(part)].astype(np.int8)]
                columns = [rows, *of_part, part, probabilities]
                writer.write_batch(pyarrow.record_batch(columns, schema=schema))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}. Choose another --out.") from error
