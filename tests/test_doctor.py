"""The doctor finds what is wrong and names the fix, and is content where nothing is."""

import importlib.util

import pytest
import torch
from conftest import launch_script

from dlrm_xla import registry

doctor = launch_script("doctor")
GOOD = {
    "torch": "2.9.0+cu128",
    "torch_xla": "2.9.0",
    "numpy": "2.4.0",
    "pyarrow": "22.0",
    "safetensors": "0.7.0",
    "scikit-learn": "1.8",
}


def test_a_machine_on_which_the_tests_run_is_well(capsys):
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "nothing is wrong" in printed
    for line in ("torch 2.", "cpu: CPU", "plugin tensorly_tt", "the loader gives", "GB free"):
        assert line in printed


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"torch": "2.11.0"}, "torch_xla 2.9.0 is built against torch 2.9"),
        ({"torch": "2.8.1", "torch_xla": "2.8.0"}, "too old"),
        ({"fbgemm-gpu": "1.4.2", "fbgemm-gpu-cpu": "1.4.2"}, "the same folder"),
        ({"torchrec": "1.4.0"}, "torchrec does not import without fbgemm"),
        ({"jax": "0.10.2", "libtpu": "0.0.21"}, "never seen to work"),
        ({"torch_tpu": "0.2.0"}, "torch_tpu 0.2.0 takes torch 2.11 to 2.15 and stands without torch_xla"),
        ({"torch_tpu": "0.2.0", "torch": "2.10.0", "torch_xla": None}, "not beside torch 2.10.0"),
        ({"numpy": None}, "numpy is missing"),
    ],
)
def test_versions_that_do_not_go_together_are_told_with_a_fix(change, match):
    found = {name: text for name, text in {**GOOD, **change}.items() if text}
    (finding,) = doctor.conflicts(found, (3, 11, 0))
    assert match in finding.text
    assert finding.fix
    assert list(doctor.conflicts(GOOD, (3, 12, 1))) == []


def test_a_plugin_that_does_not_import_and_a_device_that_is_missing_are_wrong(capsys, monkeypatch):
    real = registry.load

    def broken(name):
        if name == "hash_rows":
            raise ImportError("No module named 'gone'")
        return real(name)

    monkeypatch.setattr(registry, "load", broken)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert doctor.main(["--device", "cuda"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG plugin hash_rows: No module named 'gone'" in printed
    assert "WRONG cuda: " in printed
    assert "ok    plugin low_rank" in printed
    if importlib.util.find_spec("torch_tpu") is None:
        assert "none  tpu: --device tpu needs torch_tpu" in printed
    assert "WRONG the loader gives every process all rows" in printed
