"""The launcher as one of two hosts whose chips train together; run by test_hosts.py, twice at a time.

python tests/spmd_host.py HOST FLAG...       with CPU_NUM_DEVICES=4 and PJRT_DEVICE=CPU in the environment

XLA's CPU backend joins no processes. So each of the two has all four virtual chips and computes what both would, but
the host is shown only the parts that its half of the chips keeps: what hosts tell one another is real, what their chips
exchange is not.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))


def become(host, hosts=2):
    from dlrm_xla.xla_device import open_xla_first

    open_xla_first()
    import torch_xla
    import torch_xla.runtime

    torch_xla.runtime.process_count = lambda: hosts
    torch_xla.runtime.process_index = lambda: host
    library = torch_xla._XLAC
    half = slice(*(torch_xla.runtime.global_runtime_device_count() * k // hosts for k in (host, host + 1)))
    for name in ("_get_local_shards", "_get_local_shard_replica_and_indices"):
        whole = getattr(library, name)
        setattr(library, name, lambda arrays, whole=whole: [found[half] for found in whole(arrays)])


if __name__ == "__main__":
    become(int(sys.argv[1]))
    import run

    code = run.main(sys.argv[2:])
    sys.stdout.flush()
    os._exit(code)
