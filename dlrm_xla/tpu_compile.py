"""XLA's TPU compiler, from libtpu, for a chip that need not be there.

It runs in a process of its own, `python -m dlrm_xla.tpu_compile FOLDER`: a program that it cannot take may end the
process, and torch_xla's libtpu of another version stays out of it. Results are kept by what went in.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlrm_xla.errors import UserError

SECONDS_BETWEEN_LINES = 10.0
# Raised with every change of what a result holds.
_FORMAT = 1


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; where it refused, ``error`` and nothing else.

    ``memory``: bytes on one device by kind, ``cost``: flops and bytes accessed, ``hlo``: the scheduled module.
    """

    error: str
    memory: dict[str, int]
    cost: dict[str, float]
    hlo: str
    compiler: str
    seconds: float

    @property
    def out_of_memory(self) -> bool:
        """Whether it was refused for its size."""
        return "RESOURCE_EXHAUSTED" in self.error


def compiler_version() -> str:
    """The compiler and its version; a UserError where it is not installed."""
    missing = [name for name in ("jax", "libtpu") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the TPU compiler needs {' and '.join(missing)}: pip install -e '.[xla,tpu-compiler]'")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("libtpu", "jax"))


def check_cache(cache: Path) -> None:
    """Makes the folder of compiled steps where there is none; a UserError where nothing can be written there."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        raise UserError(
            f"--cache {cache}: compiled steps cannot be kept there ({error.strerror}); name a folder of yours"
        ) from error


def compile_for(
    topology: str,
    artifact: bytes,
    donated: Sequence[int],
    *,
    shardings: Sequence[str] = (),
    partitions: int = 1,
    chip_config: str = "default",
    cache: Path | None = None,
    identity: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> Compiled:
    """Compiles a StableHLO artifact for devices of a topology such as "v5e:2x2".

    ``donated`` are arguments whose buffers the program may write results to, as torch_xla donates them. More than one
    of ``partitions`` takes the shardings in the module (GSPMD), and ``shardings`` of its arguments. Results are kept in
    ``cache`` under the artifact, or under ``identity`` where that leaves out what does not matter. ``say`` hears that
    it still compiles, and of a result that cannot be read or kept.

    Raises UserError where jax or libtpu is missing, and where the compiler fails for any reason but memory.
    """
    compiler = compiler_version()
    request = {
        "topology": topology,
        "donated": list(donated),
        "shardings": list(shardings),
        "partitions": partitions,
        "chip_config": chip_config,
        "compiler": compiler,
        "format": _FORMAT,
        **_flags(),
    }
    what = json.dumps(request, sort_keys=True).encode() + (identity.encode() or artifact)
    key = hashlib.sha256(what).hexdigest()[:32]
    kept = cache / f"{key}.json.gz" if cache else None
    if kept and kept.exists():
        try:
            with gzip.open(kept, "rt") as file:
                return Compiled(**json.load(file))
        except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
            say(f"{kept} cannot be read ({error}); compiling anew")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "step.mlirbc").write_bytes(artifact)
        (folder / "request.json").write_text(json.dumps(request))
        began = time.monotonic()
        log = _run(folder, say)
        answer = folder / "answer.json"
        if not answer.exists():
            raise UserError(f"the TPU compiler ended without a result for {topology}: {_why(log)}")
        compiled = Compiled(
            **json.loads(answer.read_text()), compiler=compiler, seconds=round(time.monotonic() - began, 1)
        )
    if compiled.error and not compiled.out_of_memory:
        raise UserError(f"the TPU compiler refuses the step for {topology}: {compiled.error.strip().splitlines()[0]}")
    if kept:
        _keep(compiled, kept, say)
    return compiled


def _flags() -> dict[str, str]:
    """Variables of flags that the compiler reads, where set; but for the CPU's, one of which torch_xla sets itself."""
    found = {
        name: " ".join(flag for flag in os.environ.get(name, "").split() if not flag.startswith("--xla_cpu_"))
        for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
    }
    return {name: flags for name, flags in found.items() if flags}


def _keep(compiled: Compiled, kept: Path, say: Callable[[str], None]) -> None:
    """Writes a result, whole or not at all: what took minutes to compile is not lost with it."""
    part = kept.with_suffix(f".{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(part, "wt", compresslevel=3) as file:
            json.dump(asdict(compiled), file)
        part.replace(kept)
    except OSError as error:
        say(f"{kept} cannot be written ({error.strerror}); the next time this is compiled anew")
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _run(folder: Path, say: Callable[[str], None]) -> str:
    """Runs the compiler on a folder and returns what it logged."""
    # No metadata server to ask; the two names only keep libtpu from looking for them.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu"}
    log = folder / "log"
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "dlrm_xla.tpu_compile", str(folder)],
            env={**os.environ, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"},
            stdout=file,
            stderr=file,
        )
        try:
            while True:
                try:
                    process.wait(SECONDS_BETWEEN_LINES)
                    break
                except subprocess.TimeoutExpired:
                    say(f"compiling, {time.monotonic() - began:.0f} s")
        finally:
            process.kill()
            process.wait()
    return log.read_text(errors="replace")


def _why(log: str) -> str:
    """The line of a log that names a failed check, else its last."""
    lines = log.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "Check failed" in line), lines[-1])


def _compile(folder: Path) -> dict[str, Any]:
    """In the compiler's own process: reads request and module, returns the answer."""
    # jax has no public way to compile a StableHLO module of another framework for a topology.
    import numpy as np
    from jax._src import compiler
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client  # type: ignore[attr-defined]
    from jax.experimental import topologies
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    request = json.loads((folder / "request.json").read_text())
    partitions = request["partitions"]
    options = {} if request["chip_config"] == "default" else {"chip_config_name": request["chip_config"]}
    topology = topologies.get_topology_desc(platform="tpu", topology_name=request["topology"], **options)
    devices: list[Any] = topology.devices[:partitions]
    with mlir.make_ir_context() as context:
        module = stablehlo.deserialize_portable_artifact(context, (folder / "step.mlirbc").read_bytes())
        main: Any = module.body.operations[0]
        if partitions > 1:
            _enter_shards(main)
        # The attribute that jax itself gives donated arguments: XLA pairs them with results, as it does for torch_xla.
        donor = {"jax.buffer_donor": ir.BoolAttr.get(True)}
        given: Any = main.attributes["arg_attrs"] if "arg_attrs" in main.attributes else [{}] * len(main.type.inputs)
        donated = set(request["donated"])
        shardings = [{"mhlo.sharding": ir.StringAttr.get(s)} for s in request["shardings"]] or [{}] * len(given)
        main.attributes["arg_attrs"] = ir.ArrayAttr.get(
            [
                ir.DictAttr.get({a.name: a.attr for a in attributes} | sharding | (donor if i in donated else {}))
                for i, (attributes, sharding) in enumerate(zip(given, shardings, strict=True))
            ]
        )
        compile_options = compiler.get_compile_options(
            num_replicas=1,
            num_partitions=partitions,
            device_assignment=np.array([[d.id for d in devices]]),
        )
        compile_options.executable_build_options.use_spmd_partitioning = partitions > 1
        compile_options.executable_build_options.use_shardy_partitioner = False
        # As torch_xla does: otherwise each result is made whole on each chip.
        compile_options.executable_build_options.allow_spmd_sharding_propagation_to_output = [partitions > 1]
        try:
            executable = devices[0].client.compile(module, xla_client.DeviceList(tuple(devices)), compile_options)
        except Exception as error:  # of jaxlib's own types; the text is all that is in them
            return {"error": str(error), "memory": {}, "cost": {}, "hlo": ""}
    stats = executable.get_compiled_memory_stats()
    names = ("argument", "output", "alias", "temp", "generated_code")
    cost = executable.cost_analysis()
    return {
        "error": "",
        "memory": {n: getattr(stats, f"{n}_size_in_bytes") for n in names},
        "cost": {n: cost[n] for n in ("flops", "bytes accessed", "transcendentals") if n in cost},
        "hlo": executable.hlo_modules()[0].to_string(),
    }


def _enter_shards(main: Any) -> None:
    """Has every value that the part written for one chip reads come into it by name, as `jax.shard_map` does.

    torch_xla marks the arrays that a step names, not the numbers beside them; at such a number libtpu 0.0.42 ends with
    "Check failed: new_num_elements == num_elements()" in its propagation of shardings.
    """
    from jaxlib.mlir import ir

    def called(operation: Any) -> str:
        name: str = operation.attributes["call_target_name"].value if operation.name == "stablehlo.custom_call" else ""
        return name

    def custom_call(target: str, value: Any, sharding: str) -> Any:
        attributes = {"call_target_name": ir.StringAttr.get(target), "mhlo.sharding": ir.StringAttr.get(sharding)}
        made = ir.Operation.create("stablehlo.custom_call", [value.type], [value], attributes)  # type: ignore[arg-type]
        return made.results[0]

    inside: set[Any] = set()
    entered: dict[Any, Any] = {}
    for view in list(main.regions[0].blocks[0].operations):
        operation = view.operation
        if called(operation) == "SPMDFullToShardShape":
            inside |= set(operation.results)
        if called(operation).startswith("SPMD") or not any(v in inside for v in operation.operands):
            continue
        for place, value in enumerate(operation.operands):
            if value not in inside and value not in entered:
                with ir.InsertionPoint(view), ir.Location.unknown():
                    whole = custom_call("Sharding", value, "{replicated}")
                    entered[value] = custom_call("SPMDFullToShardShape", whole, "{manual}")
            operation.operands[place] = entered.get(value, value)
        inside |= set(operation.results)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    (target / "answer.json.part").write_text(json.dumps(_compile(target)))
    (target / "answer.json.part").replace(target / "answer.json")
