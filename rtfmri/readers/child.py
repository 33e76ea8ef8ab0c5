"""Processes of our own for what must not touch the run's: the network, and decoders in C."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def start_child(
    module: str, *arguments: str, stdout: int = subprocess.DEVNULL, pass_fds: Sequence[int] = ()
) -> "subprocess.Popen[bytes]":
    """Run a module of this package as a program.

    It imports what this process imports, says nothing on standard error (a traceback can quote
    headers), and is to end when its standard input does: that is when this process is gone,
    however that ended.

    Raises
    ------
    OSError
        If it cannot be started.
    """
    paths = [str(Path(path).absolute()) for path in sys.path]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        pass_fds=pass_fds,
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run
    )


def limit_child(memory_bytes: int) -> None:
    """Limit what this process may allocate; called in the child.

    It leaves no core dump either, which would hold what patients are called.
    """
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
