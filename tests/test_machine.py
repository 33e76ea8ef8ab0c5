import sys
from types import SimpleNamespace

import numpy as np
import pytest

from rtfmri import machine


def found(findings):
    return {finding.name: finding for finding in findings}


@pytest.fixture
def proc(tmp_path, monkeypatch):
    """An empty /proc and /sys, as on a system that has none."""
    folder = tmp_path / "proc"
    folder.mkdir()
    monkeypatch.setattr(machine, "_PROC", folder)
    monkeypatch.setattr(machine, "_SYS", tmp_path / "sys")
    return folder


@pytest.fixture
def no_cupy(monkeypatch):
    monkeypatch.setattr(machine, "gpu_problem", lambda: "CuPy is not installed")
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "cupy" else name)


def nvidia(proc, version):
    gpu = proc / "driver/nvidia/gpus/0000:01:00.0"
    gpu.mkdir(parents=True)
    (gpu / "information").write_text("Model: \t\t NVIDIA RTX A4000\nIRQ:   \t\t 1\n")
    text = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Tue Sep 1 2026\nGCC\n"
    (proc / "driver/nvidia/version").write_text(text)


def test_every_line_is_there_and_the_measured_disk_is_left_clean(tmp_path):
    findings = found(machine.inspect(tmp_path))
    assert {
        "Python",
        "processor",
        "threads",
        "memory",
        "memory bandwidth",
        "disk",
        "GPU",
        "CuPy",
        "packages",
        "tests",
    } <= set(findings)
    assert findings["packages"].status == "ok"
    assert findings["disk"].value.split(" ")[1] == "MB/s,"
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_ok_has_an_advice(tmp_path, no_cupy, proc):
    for finding in machine.inspect(tmp_path / "absent"):
        assert (finding.status == "ok") == (not finding.advice)


def test_nothing_breaks_without_proc_and_sys(proc, tmp_path):
    findings = found(machine.inspect(tmp_path))
    assert findings["memory"].value == "unknown"
    assert findings["processor"].value
    assert machine.caches() == {}
    assert machine.beyond_caches_bytes() == 128 << 20


@pytest.mark.parametrize("name", ["absent", "file"])
def test_a_folder_that_cannot_be_written_is_a_warning_without_its_path(tmp_path, name):
    (tmp_path / "file").touch()
    finding = found(machine.inspect(tmp_path / name))["disk"]
    assert finding.status == "warning"
    assert finding.value.startswith("cannot write: ")
    assert str(tmp_path) not in finding.value


def test_gpu_without_cupy_is_seen_and_the_extra_for_its_driver_named(proc, tmp_path, no_cupy):
    nvidia(proc, "580.65.06")
    findings = found(machine.inspect(tmp_path))
    assert findings["GPU"].value == "NVIDIA RTX A4000"
    assert findings["driver"].value == "580.65.06"
    assert findings["CuPy"].status == "missing"
    assert findings["CuPy"].advice == "pip install 'rtfmri[cuda13]'"


def test_older_driver_gets_the_older_extra(proc, tmp_path, no_cupy):
    nvidia(proc, "550.54.15")
    assert found(machine.inspect(tmp_path))["CuPy"].advice == "pip install 'rtfmri[cuda12]'"


def test_gpu_with_cupy_is_described(proc, tmp_path, monkeypatch):
    nvidia(proc, "580.65.06")
    monkeypatch.setattr(machine, "gpu_problem", lambda: None)
    device = SimpleNamespace(id=0, mem_info=(1, 150_000_000_000), compute_capability="90")
    runtime = SimpleNamespace(
        getDeviceProperties=lambda _: {"name": b"NVIDIA H200", "l2CacheSize": 60 << 20},
        driverGetVersion=lambda: 13010,
    )
    cuda = SimpleNamespace(Device=lambda: device, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda, __version__="14.0"))
    findings = found(machine.inspect(tmp_path))
    assert findings["GPU"].value == "NVIDIA H200, 150.0 GB, sm_90"
    assert findings["driver"].value == "580.65.06, CUDA 13.1"
    assert findings["CuPy"].value == "14.0"
    assert machine.describe()["gpu"]["l2_kib"] == 60 * 1024


def test_cupy_without_a_driver_is_a_warning(proc, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "gpu_problem", lambda: "CuPy finds no GPU")
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    finding = found(machine.inspect(tmp_path))["CuPy"]
    assert (finding.status, finding.value) == ("warning", "CuPy finds no GPU")


def test_missing_packages_come_with_the_command_that_adds_them(tmp_path, monkeypatch):
    absent = {"h5py", "nilearn", "pytest", "cupy"}
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name in absent else name)
    findings = found(machine.inspect(tmp_path))
    assert findings["packages"].advice == "pip install h5py nilearn"
    assert (findings["tests"].value, findings["tests"].status) == ("pytest", "missing")
    assert findings["tests"].advice == "pip install 'rtfmri[test]'"


def test_low_memory_is_a_warning(proc, tmp_path):
    (proc / "meminfo").write_text("MemTotal: 4000000 kB\nMemAvailable: 1000000 kB\nHuge: 0\n")
    finding = found(machine.inspect(tmp_path))["memory"]
    assert (finding.status, finding.value) == ("warning", "1.0 of 4.1 GB free")


def test_threading_layer_that_ends_the_process_is_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.numba, "threading_layer", lambda: "workqueue")
    finding = found(machine.inspect(tmp_path))["threading layer"]
    assert finding.status == "warning"
    assert "libgomp" in finding.advice


def test_processor_and_caches_are_read_from_the_kernels_files(proc, tmp_path):
    (proc / "cpuinfo").write_text("processor: 0\nmodel name\t: Some CPU: fast\nflags: a b\n")
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "1024K")]
    ):
        folder = tmp_path / f"sys/devices/system/cpu/cpu0/cache/index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    assert machine.cpu_model() == "Some CPU: fast"
    assert machine.caches() == {"L1": 48 << 10, "L2": 1 << 20}
    assert machine.beyond_caches_bytes() == 4 << 20


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n_bytes", [1, 12, 120_000])
def test_triad_goes_through_all_of_its_arrays(n_bytes, threads):
    triad = machine.Triad(n_bytes, threads)
    a, b, c = triad._arrays
    assert triad.n_bytes == a.nbytes + b.nbytes + c.nbytes
    assert abs(triad.n_bytes - max(12, n_bytes)) < 12
    a[:] = 0
    triad()
    np.testing.assert_array_equal(a, np.full(a.size, 2 + 0.5 * 3, np.float32))


def test_bandwidth_is_bytes_over_the_median_time(monkeypatch):
    ticks = iter(np.cumsum([0, 1, 0, 9, 0, 2, 0, 3, 0, 2, 0, 2, 0, 9]) * 1e-3)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(ticks))
    assert machine.triad_bandwidth_gb_s(1_200_000) == pytest.approx(1.2e-3 / 2e-3)


def test_description_names_neither_host_nor_folder(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert machine.describe()["openmp"]["OMP_WAIT_POLICY"] == "active"
    text = repr(machine.describe())
    assert "/" not in text
    assert machine.describe()["threads"] == machine.usable_threads()
