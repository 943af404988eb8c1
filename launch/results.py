#!/usr/bin/env python
"""Makes docs/results.md, docs/paper.md and the README's table of results from docs/results.csv.

python launch/results.py                                              writes them (make results)
python launch/results.py --check                                      says what is not current, exit code 1
python launch/results.py --table runs/criteo_sample/results.parquet   first makes a study's runs the table
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dlrm_xla.errors import UserError

try:
    import pandas as pd
    from dlrm_xla_studies import documents
except ModuleNotFoundError as error:
    print(f"error: results need {error.name}: pip install -e '.[studies]'", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Returns the exit code: 0, 1 where --check finds something, 2 for the user's mistakes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a document is not current")
    parser.add_argument("--table", type=Path, help="results.parquet of a study")
    given = parser.parse_args(arguments)
    try:
        if given.table:
            documents.keep(pd.read_parquet(given.table), root)
        made = documents.documents(root)
        stale = [path for path, text in made.items() if not path.exists() or path.read_text() != text]
        if given.check:
            for path in stale:
                print(f"{path.relative_to(root)} is not what docs/results.csv makes it: run make results")
            return 1 if stale else 0
        for path in stale:
            path.write_text(made[path])
        for path in [*stale, *documents.draw(root)]:
            print(f"wrote {path.relative_to(root)}")
        return 0
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
