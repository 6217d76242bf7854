"""Each module of kernels/ imported first, before ops: `python import_first.py '{"norm": "rms_norm", ...}'`.

In a process that believes it has a CUDA device, where ops binds the launchers when it is imported. torch and Triton are
imported once; each module is then imported in a child of its own. Prints {module: what went wrong or was printed}.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback


def first(module: str, op: str) -> None:
    """Imports `module`, then ops, which must find the launcher of `op`."""
    import torch

    importlib.import_module(f"depthprune_runtime.kernels.{module}")
    assert not torch.cuda.is_initialized(), "CUDA was initialised"
    found = sorted(n for n in sys.modules if n.startswith("depthprune_runtime.") and ".kernels" not in n)
    assert not found, f"a kernels module imports {found}"
    from depthprune_runtime import ops

    assert ops.implementations(op)["CUDA"] == "native"


def in_child(module: str, op: str) -> str:
    """What the child printed, its traceback included; its status where that is not 0."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            status = 1
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                first(module, op)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        printed = output.read().decode(errors="replace")
    return printed if status == 0 else f"{printed}wait status {status}"


def main() -> None:
    import torch

    torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
    import triton  # noqa: F401

    assert not [name for name in sys.modules if name.startswith("depthprune_runtime")]
    print(json.dumps({module: in_child(module, op) for module, op in json.loads(sys.argv[1]).items()}))


if __name__ == "__main__":
    main()
