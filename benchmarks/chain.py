"""The whole path of a volume: from a Siemens mosaic's pixels to the ROIs' values.

On a GPU the host only queues the steps, which run on their own: there ``fetch`` holds the wait for
all of them, and ``total`` alone says how long a volume takes.
"""

import gc
import os
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from io import BytesIO
from itertools import cycle
from pathlib import Path
from types import FrameType
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

import rtfmri
from rtfmri.backends import Backend, open_backend
from rtfmri.config import Config, GlmSettings, SmoothingSettings
from rtfmri.design import Contrast, Design
from rtfmri.paradigm import Event, Paradigm
from rtfmri.pipeline import Pipeline, Result
from rtfmri.stages.mask import load_nilearn
from rtfmri.volume import Grid, Volume, tiled, untiled

from .measure import Clock, Plan, Row, Tables, grid_name, percentiles_ms
from .phantom import Phantom, drifting
from .tables import Layout, number, text

N_PUSHES, N_COLD = 500, 200
"""Volumes that are timed with hot and with cold caches."""
COLD_S, LEAST_COLD = 10.0, 20
"""Where emptying the caches takes long, there are fewer cold ones: no more than fit into this
time, but so many at least."""
N_GROWTH = 500
"""Volumes after which memory is looked at again."""
N_TRACED = 20
"""Volumes whose allocations are counted."""
FIRST = 10
"""Volumes that are neither timed nor looked at: the run begins, the baseline fills."""
N_PLANNED = 400
"""Volumes of the run as it is planned, which decides how many cosines of drift there are."""

FWHM_MM = 6.0
TR_S = 1.0
_ROIS_MM = {"left": (-34.0, -12.0, 18.0), "right": (34.0, -12.0, 18.0)}
_ROI_RADIUS_MM = 10.0
_TASKS, _BLOCK_S = ("left", "right"), 15.0
"""They take turns, with as much rest before each."""
_PAGE = 4096
_GOLDEN = 0.6180339887498949
TOTAL, FILE = "total", "decode of a DICOM file"
_PACKAGE = Path(rtfmri.__file__).parent


def kib(key: str) -> Callable[[Row], str]:
    """Return what shows a row's bytes in KiB; - for none."""
    return lambda row: f"{row[key] / 1024:.1f}" if key in row else "-"


LAYOUTS = {
    "chain": Layout(
        "A volume's whole way, from a mosaic's pixels to the ROIs' values, in ms",
        (
            ("grid", text("grid")),
            ("step", text("step")),
            *(
                (f"{caches} {name}", number(3, caches, f"{name}_ms"))
                for caches in ("hot", "cold")
                for name in ("p50", "p95", "p99", "max", "min")
            ),
            ("hot p99 / p50", number(2, "hot", "p99_over_p50")),
            ("cold p99 / p50", number(2, "cold", "p99_over_p50")),
        ),
    ),
    "chain_memory": Layout(
        "What that chain holds, and what a volume makes it allocate",
        (
            ("grid", text("grid")),
            ("brain voxels", text("brain_voxels")),
            ("resident MiB", lambda row: f"{row['resident_bytes'] / 2**20:.1f}"),
            ("arrays MiB", lambda row: f"{row['array_bytes'] / 2**20:.1f}"),
            (
                "device MiB",
                lambda row: f"{row['device_bytes'] / 2**20:.1f}" if "device_bytes" in row else "-",
            ),
            ("decode KiB", kib("decode_bytes")),
            ("push at most KiB", kib("push_bytes")),
            ("of a page and more", number(0, "page_sized")),
            ("voxel-sized", number(0, "voxel_sized")),
            ("of KiB", kib("voxel_sized_bytes")),
            ("where", text("voxel_sized_at")),
            ("device allocations a push", number(0, "device_allocations")),
            ("volumes", text("n_volumes")),
            ("grown KiB", kib("growth_bytes")),
            ("grown arrays", text("growth_arrays")),
        ),
    ),
}


class Waves(Design):
    """A design that needs no nilearn: cosines stand in for the responses.

    Parameters
    ----------
    n_waves : int
        Each of its own frequency, 0 at no volume of a run.
    n_contrasts : int
        All t, of the last two waves.
    settings : GlmSettings, optional
        Which drift, and whether motion is in it.

    Attributes
    ----------
    columns, contrasts
        As of any `Design`.
    """

    def __init__(
        self, n_waves: int, n_contrasts: int = 1, settings: GlmSettings | None = None
    ) -> None:
        super().__init__(Paradigm(), settings or GlmSettings(), TR_S, n_volumes=N_PLANNED)
        # Multiples of the golden ratio fall evenly: no two frequencies are close to each other.
        turns = np.modf(_GOLDEN * np.arange(1, n_waves + 1))[0]
        self._frequencies = 0.02 + 0.4 * turns
        self.columns = (*self.columns, *(f"wave_{k}" for k in range(1, n_waves + 1)))
        weights = np.zeros((n_contrasts, len(self.columns)))
        weights[:, -1] = 1.0
        if n_waves > 1:
            weights[:, -2] = np.arange(n_contrasts) / n_contrasts
        names = (f"contrast_{k}" for k in range(1, n_contrasts + 1))
        self.contrasts = tuple(
            Contrast(name, "t", row[None]) for name, row in zip(names, weights, strict=True)
        )

    def row(self, index: int) -> NDArray[np.float64]:
        """See `Design.row`."""
        waves = np.cos(2 * np.pi * self._frequencies * index + 0.1)
        return np.concatenate([super().row(index), waves])


def new_pipeline(
    backend: Backend,
    phantom: Phantom,
    *,
    design: Design | None = None,
    rois: Mapping[str, NDArray[Any]] | None = None,
    mask: NDArray[np.bool_] | None = None,
    paradigm: Paradigm | None = None,
    **settings: Any,
) -> Pipeline:
    """Return the pipeline that is timed: all that is on by default, smoothing and a GLM.

    Parameters
    ----------
    backend : Backend
    phantom : Phantom
    design : Design, optional
        By default that of two tasks in blocks; where nilearn is not there to convolve them, one
        of as many columns.
    rois, mask, paradigm
        As for `Pipeline`; by default two spheres, what the pipeline finds, two tasks in blocks.
    **settings
        Of `Config`.
    """
    if design is None and not find_spec("nilearn"):
        design = Waves(len(_TASKS), len(_TASKS))
    device: Any = backend.name
    config = Config(
        device=device,
        smoothing=SmoothingSettings(fwhm_mm=FWHM_MM),
        glm=GlmSettings(noise="off" if design else "ols"),
        **settings,
    )
    pipeline = Pipeline(
        phantom.grid,
        config,
        paradigm=paradigm or Paradigm(_blocks(), config.paradigm, config.baseline),
        rois=rois or {name: _sphere(phantom.grid, at) for name, at in _ROIS_MM.items()},
        mask=phantom.mask() if mask is None else mask,
        n_volumes=N_PLANNED,
        backend=backend,
    )
    if design:
        pipeline.design = design  # which is fitted, since "off" only keeps it from making its own
    return pipeline


class Chain:
    """Mosaics that come one after the other, there and back, and the pipeline that takes them.

    Parameters
    ----------
    backend : Backend
    shape : (int, int, int)
        Of the volumes.

    Attributes
    ----------
    images : list of (x, y, z) int16
        What is in the mosaics.
    pipeline : Pipeline
        There from `begin` on.
    n_pushed : int
        Mosaics taken apart so far: the next is of image ``n_pushed % len(images)``.
    """

    pipeline: Pipeline

    def __init__(self, backend: Backend, shape: tuple[int, int, int]) -> None:
        self.backend, self.phantom = backend, Phantom(shape)
        self.images = drifting(self.phantom)
        self._mosaics = [tiled(image) for image in self.images]
        self.n_pushed = 0

    def begin(self) -> None:
        """Make the pipeline, and take it through its first volumes."""
        self.pipeline = new_pipeline(self.backend, self.phantom)
        self.n_pushed = 0
        for _ in range(FIRST):
            self.push()
        self.backend.synchronize()

    def decoded(self) -> Volume:
        """Take the next mosaic apart."""
        arrived_s = time.perf_counter()
        data = untiled(self._mosaics[self.n_pushed % len(self._mosaics)], self.phantom.grid.shape)
        volume = Volume(data, self.phantom.grid, self.n_pushed, tr_s=TR_S, arrived_s=arrived_s)
        self.n_pushed += 1
        return volume

    def push(self) -> Result:
        """Take the next mosaic all the way; then do, as a `Session` does, what could wait."""
        result = self.pipeline.push(self.decoded())
        self.pipeline.catch_up()
        return result


def run(plan: Plan) -> Tables:
    """Return the rows of ``chain``, one a grid and step, and of ``chain_memory``, one a grid."""
    rows, memory = [], []
    if find_spec("nilearn"):
        load_nilearn()  # which is no memory of a chain's
    for shape in plan.grids:
        plan.progress(f"the whole chain, {grid_name(shape)}")
        chain = Chain(plan.backend, shape)
        gc.collect()  # a pipeline's graph holds it in a circle
        before = resident_bytes()
        chain.begin()
        resident = resident_bytes() - before
        rows += _steps(plan.clock, chain)
        del chain
        plan.progress(f"the whole chain's memory, {grid_name(shape)}")
        memory.append(
            {"grid": grid_name(shape), "resident_bytes": resident, **_memory(plan.backend, shape)}
        )
    return {"chain": rows, "chain_memory": memory}


def _steps(clock: Clock, chain: Chain) -> list[Row]:
    """Return a row for each step of the chain, and one for the total."""
    hot: dict[str, list[float]] = {}
    cold: dict[str, list[float]] = {}
    for _ in range(N_PUSHES):
        _note(chain.push(), hot)
    started_s = time.perf_counter()
    for i in range(N_COLD):
        if i >= LEAST_COLD and time.perf_counter() - started_s > COLD_S:
            break
        clock.largest()
        chain.backend.synchronize()
        _note(chain.push(), cold)
    if chain.backend.name == "cpu" and find_spec("pydicom") and find_spec("nibabel"):
        hot[FILE] = _decode_s(chain.images, chain.phantom.grid)
    rows = []
    for step in hot:
        if any(hot[step]):
            row: Row = {"grid": grid_name(chain.phantom.grid.shape), "step": step}
            for caches, seconds in (("hot", hot), ("cold", cold)):
                if step in seconds:
                    row[caches] = {"n": len(seconds[step]), **percentiles_ms(seconds[step])}
                    if step == TOTAL:
                        row[caches]["p99_over_p50"] = row[caches]["p99_ms"] / row[caches]["p50_ms"]
            rows.append(row)
    return rows


def _note(result: Result, seconds: dict[str, list[float]]) -> None:
    for step, ms in (*result.stage_ms.items(), (TOTAL, result.latency_ms)):
        seconds.setdefault(step, []).append(1e-3 * ms)


def _decode_s(images: Sequence[NDArray[np.int16]], grid: Grid) -> list[float]:
    """Return the times of `rtfmri.readers.dicom.decode` on whole files, header and all."""
    from rtfmri.readers.dicom import decode
    from rtfmri.simulator.dicom import mosaic_dataset

    files = []
    for i, image in enumerate(images):
        file = BytesIO()
        dataset = mosaic_dataset(image, grid, index=i, tr_s=TR_S, series_uid="1.2.3")
        dataset.save_as(file, enforce_file_format=True)
        files.append(file.getvalue())
    seconds = []
    for i in range(N_PUSHES):
        started_s = time.perf_counter()
        decode(files[i % len(files)])
        seconds.append(time.perf_counter() - started_s)
    return seconds


def _memory(backend: Backend, shape: tuple[int, int, int]) -> Row:
    """Return what a chain holds after its first volumes, and what each further one allocates.

    All by `tracemalloc`, to which NumPy and the kernels report what they allocate. On the CPU it
    is one thread's: kernels have a few lines or planes of scratch for each.
    """
    gc.collect()
    device = _device_pool() if backend.name == "cuda" else None
    device_before = device.used_bytes() if device else 0
    with _on_one_thread(backend) as one, _traced():
        chain = Chain(one, shape)
        _, before = _arrays()
        chain.begin()
        n_arrays, held = _arrays()
        row: Row = {"array_bytes": held - before}
        if device:
            row["device_bytes"] = device.used_bytes() - device_before
        at_first = _held_bytes()
        for _ in range(N_GROWTH):
            chain.push()
        row["n_volumes"] = N_GROWTH
        row["growth_bytes"] = _held_bytes() - at_first
        row["growth_arrays"] = _arrays()[0] - n_arrays
        brain = chain.pipeline.brain
        assert brain is not None
        row["brain_voxels"] = n_brain = int(np.count_nonzero(brain))
        return row | _allocations(chain, n_brain) | (_on_device(chain) if device else {})


def _allocations(chain: Chain, voxel_sized: int) -> Row:
    """Return what is allocated for a volume: by its decoding, and by the pipeline.

    Parameters
    ----------
    chain : Chain
    voxel_sized : int
        Bytes from which an allocation is one of an array of voxels.
    """
    decode, push = [], []
    counts: list[Tally] = []
    volumes = [chain.decoded()]
    for _ in range(N_TRACED):
        decode.append(peak_bytes(chain.decoded))
        # The pipeline still has the one before: let it not make room for what is counted.
        volumes = [volumes[-1], chain.decoded(), chain.decoded()]
        push.append(peak_bytes(partial(chain.pipeline.push, volumes[1])))
        counts.append(Tally(_PAGE))
        counts[-1].run(partial(chain.pipeline.push, volumes[2]))
    most = max((tally.found for tally in counts), key=len)
    large = [(line, n_bytes) for line, n_bytes in most if n_bytes >= voxel_sized]
    return {
        "decode_bytes": max(decode),
        "push_bytes": max(push),
        "page_sized": len(most),
        "voxel_sized": len(large),
        "voxel_sized_bytes": sum(n_bytes for _, n_bytes in large),
        "voxel_sized_at": ", ".join(sorted({line for line, _ in large})) or "-",
    }


def peak_bytes(call: Callable[[], object]) -> int:
    """Return how much more memory than before there was at once while *call* ran."""
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    call()
    return tracemalloc.get_traced_memory()[1] - before


class Tally:
    """Finds the lines of a package that allocate much, as often as they run.

    From one line to the next, `tracemalloc` says by how much memory rose at most: so what is gone
    again before the line ends counts, too. Several small allocations of one line are as one.

    Parameters
    ----------
    least_bytes : int
        What counts.
    folder : Path
        Of the package; what code elsewhere allocates is the doing of the line that called it.

    Attributes
    ----------
    found : list of (str, int)
        File and line, and bytes, each time that it happened.
    """

    def __init__(self, least_bytes: int, folder: Path = _PACKAGE) -> None:
        self.found: list[tuple[str, int]] = []
        self._least, self._folder = least_bytes, f"{folder}{os.sep}"
        self._line, self._before = "", 0

    def run(self, call: Callable[[], object]) -> None:
        """Do *call*, slowly, and look."""
        elsewhere = sys.gettrace()
        self._go_on()
        sys.settrace(self._trace)
        try:
            call()
        finally:
            sys.settrace(elsewhere)
        self._count()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        self._count()
        caller: FrameType | None = frame.f_back if event == "return" else frame
        while caller and not caller.f_code.co_filename.startswith(self._folder):
            caller = caller.f_back
        if caller:
            file = Path(caller.f_code.co_filename.removeprefix(self._folder)).as_posix()
            self._line = f"{file}:{caller.f_lineno}"
        self._go_on()
        return self._trace if caller is frame else None

    def _count(self) -> None:
        rise = tracemalloc.get_traced_memory()[1] - self._before
        if rise >= self._least:
            self.found.append((self._line, rise))

    def _go_on(self) -> None:
        tracemalloc.reset_peak()
        self._before = tracemalloc.get_traced_memory()[0]


@contextmanager
def _traced() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


@contextmanager
def _on_one_thread(backend: Backend) -> Iterator[Backend]:
    """Give a backend that has one thread, where that is the CPU's; else the backend itself."""
    if backend.name != "cpu":
        yield backend
        return
    try:
        yield open_backend("cpu", 1)
    finally:
        use_threads_of(backend)


def use_threads_of(backend: Any) -> None:
    """Let kernels run on the threads of *backend*: numba knows of one number for all."""
    if backend.name == "cpu":
        numba.set_num_threads(backend.threads)


def _arrays() -> tuple[int, int]:
    """Return how many blocks of memory NumPy's arrays hold, and their bytes."""
    domain = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    traces = tracemalloc.take_snapshot().filter_traces([domain]).traces
    sizes = [trace.size for trace in traces]
    return len(sizes), sum(sizes)


def _held_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def _device_pool() -> Any:
    import cupy

    return cupy.get_default_memory_pool()


def _on_device(chain: Chain) -> Row:
    """Return how often a push asks for memory of the GPU, and for how much."""
    import cupy

    sizes: list[int] = []

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "rtfmri benchmark"

        def malloc_postprocess(self, **told: Any) -> None:
            sizes.append(int(told["size"]))

    with Hook():
        for _ in range(N_TRACED):
            chain.push()
    return {
        "device_allocations": len(sizes) / N_TRACED,
        "device_allocated_bytes": sum(sizes) / N_TRACED,
    }


def resident_bytes() -> int:
    """Return the memory that this process holds; 0 where /proc does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _blocks() -> list[Event]:
    run_s = TR_S * max(N_PLANNED, FIRST + N_PUSHES + N_COLD)
    onsets_s = np.arange(_BLOCK_S, run_s, 2 * _BLOCK_S).tolist()
    return [Event(onset_s, _BLOCK_S, task) for onset_s, task in zip(onsets_s, cycle(_TASKS))]


def _sphere(grid: Grid, centre_mm: Sequence[float]) -> NDArray[np.float32]:
    voxels = np.indices(grid.shape).reshape(3, -1)
    places_mm = (grid.affine[:3, :3] @ voxels).T + grid.affine[:3, 3]
    distances_mm = np.linalg.norm(places_mm - centre_mm, axis=1)
    inside = distances_mm <= max(_ROI_RADIUS_MM, distances_mm.min())
    weights: NDArray[np.float32] = inside.reshape(grid.shape).astype(np.float32)
    return weights
