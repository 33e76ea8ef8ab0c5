"""How many threads a kernel gets."""

_SMALLEST_SHARE = 4096
"""Voxels below which another thread costs more than it saves."""


class Threads:
    """What the families of operations share: the number of threads, set once."""

    threads: int

    def _share(self, n_voxels: int) -> int:
        return max(1, min(self.threads, n_voxels // _SMALLEST_SHARE))
