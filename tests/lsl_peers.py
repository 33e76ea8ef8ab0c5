"""Listeners to LSL streams in a process of their own, with LSL's own settings.

Streams are found by their names, so that tests that open some take turns (`taking_turns`).
"""

import fcntl
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_LISTENER = """
import json, sys
import pylsl

(found,) = pylsl.resolve_byprop("name", sys.argv[1], timeout=60)
inlet = pylsl.StreamInlet(found)
info = inlet.info(timeout=60)
told = [info.name(), info.type(), info.nominal_srate(), info.channel_format()]
print(json.dumps([told, info.get_channel_labels(), info.source_id()]), flush=True)
for _ in range(int(sys.argv[2])):
    sample, stamp = inlet.pull_sample(timeout=60)
    print(json.dumps([sample, stamp, pylsl.local_clock()]), flush=True)
"""


@contextmanager
def taking_turns() -> Iterator[None]:
    """Wait until no other test has LSL streams open."""
    with Path(tempfile.gettempdir(), "rtfmri-tests-lsl.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Listener:
    """Takes the first *n* samples of a stream."""

    def __init__(self, name: str, n: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LISTENER, name, str(n)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

        self._info: list[Any] | None = None

    def info(self) -> list[Any]:
        """Wait until it has found the stream; return what it is told of it."""
        assert self._process.stdout
        if self._info is None:
            self._info = json.loads(self._process.stdout.readline())
        return self._info

    @property
    def satisfied(self) -> bool:
        """Whether it has its samples."""
        return self._process.poll() is not None

    def samples(self) -> list[Any]:
        """Wait for the samples: their values, stamps, and times of arrival."""
        self.info()
        assert self._process.stdout
        return [json.loads(line) for line in self._process.stdout]

    def pause(self) -> None:
        """Let it do nothing any longer."""
        self._process.send_signal(signal.SIGSTOP)

    def close(self) -> None:
        """End it, whatever it waits for."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()
