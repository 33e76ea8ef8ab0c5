"""A file of JSON lines: one that tells of the run when it begins, then one a volume."""

import json
from pathlib import Path

from rtfmri.errors import ConfigError
from rtfmri.feedback.message import Message, Run


def open_file(target: str) -> "FileOutput":
    """Open ``file:PATH``, which must not exist.

    Raises
    ------
    ConfigError
        If it exists, or cannot be created.
    """
    path = Path(target.removeprefix("//"))
    if not target:
        raise ConfigError("a file must have a name, such as file:feedback.jsonl")
    try:
        return FileOutput(path)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; name another file, or remove it") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


class FileOutput:
    """Appends a line a volume, which is with the operating system when `send` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)

    def begin(self, run: Run) -> None:
        """See `Output.begin`."""
        self._file.write(json.dumps({"run": run._asdict()}).encode() + b"\n")

    def send(self, message: Message) -> None:
        """See `Output.send`."""
        self._file.write(message.json + b"\n")

    def end(self) -> None:
        """See `Output.end`."""

    def close(self) -> None:
        """See `Output.close`."""
        self._file.close()
