"""Transfers and launches of the backends, and the cuda backend's CuPy part on a stand-in."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cuda_on_cpu import HostStaging, Module, open_cuda_on_cpu
from rtfmri.backends import Backend, Moments
from rtfmri.backends.cuda import CudaBackend
from rtfmri.backends.cuda._launch import PinnedStaging
from rtfmri.errors import DeviceError


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
def test_arrays_come_back_as_they_went(backend: Backend, dtype: str) -> None:
    host = np.arange(-3, 9).astype(dtype)
    for there in (backend.upload(host), backend.copy(host)):
        back = backend.download(there)
        np.testing.assert_array_equal(back, host, strict=True)
        back[:] = 0
        np.testing.assert_array_equal(backend.download(there), host)


def test_a_copy_outlives_its_source(backend: Backend) -> None:
    host = np.arange(6, dtype=np.float32)
    there = backend.copy(host)
    host[:] = 9
    backend.copy(host)
    assert backend.download(there).tolist() == [0, 1, 2, 3, 4, 5]


def test_a_copy_of_another_memory_order_keeps_its_places(backend: Backend) -> None:
    host = np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3))
    np.testing.assert_array_equal(backend.download(backend.copy(host)), host)


@pytest.mark.parametrize("shape", [4, (2, 3)])
def test_zeros(backend: Backend, shape: int | tuple[int, ...]) -> None:
    for dtype in ("float32", "int16"):
        got = backend.download(backend.zeros(shape, dtype))
        np.testing.assert_array_equal(got, np.zeros(shape, dtype), strict=True)
    backend.synchronize()


@pytest.mark.parametrize("dtype", ["int16", "uint16", "float32"])
def test_a_warm_backend_compiles_nothing_more(dtype: str) -> None:
    sources: list[str] = []

    def compile_module(source: str, defines: Mapping[str, str]) -> Module:
        sources.append(source)
        return Module(source, defines)

    backend = CudaBackend(np, compile_module, HostStaging())
    backend.warm(dtype)
    n_compiled = len(sources)
    backend.warm(dtype)
    assert len(sources) == n_compiled > 0


def test_a_voxel_type_without_kernels_is_refused() -> None:
    backend = open_cuda_on_cpu("forward")
    moments = Moments(backend.zeros(3), backend.zeros(3))
    with pytest.raises(DeviceError, match=r"int16, uint16, float32 .* got float64"):
        backend.fold(backend.zeros(3, "float64"), moments, gain=1.0)


class LazyStream:
    """A stream whose work is done as late as it may be: when somebody waits."""

    def __init__(self, non_blocking: bool) -> None:
        self._work: list[Callable[[], None]] = []
        self._done: list[Callable[[], None]] = []

    def queue(self, work: Callable[[], None]) -> None:
        self._work.append(work)

    def synchronize(self) -> None:
        while self._work:
            self._work.pop(0)()

    def begin_capture(self) -> None:
        assert not self._work, "a capture must not begin with work that waits"
        self._done, self._work = self._work, []

    def end_capture(self) -> SimpleNamespace:
        """Return a graph of what was queued since the capture began, which was not done."""
        captured, self._work = self._work, self._done
        return SimpleNamespace(launch=lambda stream: [stream.queue(work) for work in captured])

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class LazyEvent:
    def __init__(self, disable_timing: bool) -> None:
        self._stream: LazyStream | None = None

    def record(self, stream: LazyStream) -> None:
        self._stream = stream

    def synchronize(self) -> None:
        if self._stream:
            self._stream.synchronize()


class LazyArray:
    """A device array to and from which copies are asynchronous, as from page-locked memory."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.device = np.full(shape, 77, dtype)
        self.shape, self.dtype = shape, np.dtype(dtype)

    def set(self, host: NDArray[Any], stream: LazyStream) -> None:
        assert host.flags.c_contiguous
        assert (host.shape, host.dtype) == (self.shape, self.dtype)
        stream.queue(lambda: np.copyto(self.device, host))

    def get(self, stream: LazyStream, out: NDArray[Any] | None = None) -> NDArray[Any]:
        stream.synchronize()
        out = np.empty_like(self.device) if out is None else out
        np.copyto(out, self.device)
        return out


@pytest.fixture
def staging() -> PinnedStaging:
    cuda = SimpleNamespace(Stream=LazyStream, Event=LazyEvent, alloc_pinned_memory=bytearray)
    return PinnedStaging(SimpleNamespace(cuda=cuda, empty=LazyArray))


def test_an_upload_waits_for_the_one_before_it(staging: PinnedStaging) -> None:
    seen = []
    for value in (1, 2, 3):
        array = staging.upload(np.full(4, value, np.int16))
        # A kernel that reads the volume; it too is queued and done late.
        staging.stream.queue(lambda array=array: seen.append(int(array.device[0])))
    staging.synchronize()
    assert seen == [1, 2, 3]


def test_an_upload_does_not_keep_the_callers_memory(staging: PinnedStaging) -> None:
    host = np.full(4, 5, np.int16)
    array = staging.upload(host)
    host[:] = 6
    assert staging.download(array).tolist() == [5, 5, 5, 5]


def test_uploads_of_a_shape_share_one_device_array(staging: PinnedStaging) -> None:
    first, second = (staging.upload(np.full(4, v, np.int16)) for v in (1, 2))
    assert first is second
    assert staging.upload(np.zeros(4, np.float32)) is not first


def test_copies_are_their_own_and_done(staging: PinnedStaging) -> None:
    host = np.full(4, 1, np.int32)
    array = staging.copy(host)
    host[:] = 2
    other = staging.copy(host)
    assert staging.download(array).tolist() == [1, 1, 1, 1]
    assert staging.download(other).tolist() == [2, 2, 2, 2]


def test_fetched_values_outlive_the_next_fetch(staging: PinnedStaging) -> None:
    first = staging.fetch(staging.copy(np.full(2, 1, np.float32)))
    second = staging.fetch(staging.copy(np.full(2, 2, np.float32)))
    assert (first.tolist(), second.tolist()) == ([1, 1], [2, 2])


def test_recorded_work_is_done_at_once_and_again_with_what_is_there_then(
    staging: PinnedStaging,
) -> None:
    seen: list[int] = []
    asked: list[int] = []
    array = staging.upload(np.full(4, 1, np.int16))

    def work() -> None:
        asked.append(1)
        staging.stream.queue(lambda: seen.append(int(array.device[0])))

    again = staging.record(work)
    n_asked = len(asked)
    for value in (2, 3):
        staging.upload(np.full(4, value, np.int16))
        again()
    staging.synchronize()
    assert seen == [1, 2, 3]
    assert len(asked) == n_asked  # a replay asks the host for nothing
