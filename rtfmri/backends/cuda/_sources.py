"""Where the CUDA sources are, and their text ready for NVRTC."""

import re
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]
_INCLUDE = re.compile(r'[ \t]*#include "([^"]+)"[^\n]*')


def _find_kernels() -> Path:
    # A wheel has the sources inside the package, a checkout beside it.
    candidates = (_PACKAGE / "kernels", _PACKAGE.parent / "kernels")
    for folder in candidates:
        if (folder / "common.cuh").is_file():
            return folder
    raise FileNotFoundError(
        f"the CUDA sources are missing: no common.cuh in {candidates[0]} or {candidates[1]}; "
        "reinstall rtfmri"
    )


KERNELS = _find_kernels()


def cuda_source(name: str) -> str:
    """Return kernel file *name* with its local includes pasted in, line numbers kept.

    CuPy keys its disk cache on the source text alone: a text that still said
    ``#include "moments.cuh"`` would be served a stale binary after an edit of the header.
    """
    seen: set[str] = set()

    def expand(file_name: str) -> list[str]:
        if file_name in seen:
            return []
        seen.add(file_name)
        lines = [f'#line 1 "{file_name}"']
        text = (KERNELS / file_name).read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), start=1):
            if include := _INCLUDE.fullmatch(line):
                lines += [*expand(include[1]), f'#line {number + 1} "{file_name}"']
            else:
                lines.append("" if line.strip() == "#pragma once" else line)
        return lines

    return "\n".join(expand(name)) + "\n"
