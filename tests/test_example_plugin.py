"""The example package as a stranger uses it: installed, found, run by the launcher, tested by its own test."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLE = ROOT / "tests" / "example_plugin"


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    # The build copies nothing into our tree: setuptools would leave build/ and an egg-info beside the source.
    source = tmp_path_factory.mktemp("source") / "example"
    subprocess.run(["cp", "-r", str(EXAMPLE), str(source)], check=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(source)], check=True
    )
    return {**os.environ, "PYTHONPATH": str(site)}


def run(environment, *command, cwd=ROOT):
    return subprocess.run([sys.executable, *command], env=environment, cwd=cwd, capture_output=True, text=True)


def test_it_is_listed_with_its_package(environment):
    done = run(environment, "launch/run.py", "--list-plugins")
    assert "rank_one  (dlrm-xla-example-plugin 0.1.0)" in done.stdout
    assert "rank: int = 1" in done.stdout
    assert "tensorly_tt" in done.stdout


def test_the_launcher_runs_it_composed_with_ours(environment, tmp_path):
    out = tmp_path / "run"
    plugin = "hash_rows:rows=500+rank_one:rank=3"
    arguments = ["--plugin", plugin, "--synthetic-rows", "7000", "--min-count", "1", "--out", str(out)]
    done = run(environment, "launch/run.py", *arguments)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    assert any(row["plugin"] == plugin for row in report["tables"])
    assert report["auc"] > 0.5


@pytest.mark.slow
def test_it_passes_its_own_tests(environment):
    done = run(environment, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_rank_one.py", cwd=EXAMPLE)
    assert done.returncode == 0, done.stdout
