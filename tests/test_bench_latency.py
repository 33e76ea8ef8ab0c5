"""Benchmarks through real transports: latency, the TR sustained, transports, soak."""

import importlib
import itertools
import json
import os
import sys
from types import SimpleNamespace

import numba
import numpy as np
import pytest

from rtfmri.backends import open_backend
from rtfmri.cli import load_benchmarks

SHAPE = (16, 16, 12)
benchmarks = load_benchmarks()
latency, measure, soak, sustained, tables, transports = (
    importlib.import_module(f"{benchmarks.__name__}.{name}")
    for name in ("latency", "measure", "soak", "sustained", "tables", "transports")
)
Attempt, Transport = sustained.Attempt, transports.Transport
NOWHERE = Transport("nowhere", "tcp://:0", "nowhere:{address}")
needs_pinning = pytest.mark.skipif(
    not latency.can_pin(), reason="this system pins no process to a processor"
)


def plan(minutes=0.01, said=lambda _: None):
    backend = open_backend("cpu")
    return measure.Plan(backend, None, (SHAPE,), 1, minutes, said)


def shown(rows, module):
    """Return how the rows of a table look in the README, once they have been JSON."""
    (name,) = (name for name in module.LAYOUTS if name in rows)
    report = {"tables": json.loads(json.dumps(rows, allow_nan=False))}
    return tables.cells(module.LAYOUTS[name], report["tables"][name])


@pytest.fixture
def two_paces(monkeypatch):
    monkeypatch.setattr(latency, "TRS_S", (0.05, 0.1))
    monkeypatch.setattr(latency, "COMMON_S", 0.05)
    monkeypatch.setattr(latency, "COMPARED", latency.COMPARED[:1])


@needs_pinning
def test_latency_is_told_for_every_pace_transport_and_neighbour(two_paces):
    said, n_threads = [], numba.get_num_threads()
    rows = latency.run(plan(said=said.append))["latency"]
    spared = [latency.SPARED] if latency.can_spare(plan()) else []
    cases = [
        ("ours, TCP", 50, ["idle", "busy", *spared]),
        ("ours, TCP", 100, ["idle", "busy"]),
        ("folder, local", 50, ["idle", "busy"]),
    ]
    assert [(row["transport"], row["tr_ms"], row["neighbour"]) for row in rows] == [
        (transport, tr_ms, neighbour)
        for transport, tr_ms, neighbours in cases
        for neighbour in neighbours
    ]
    assert numba.get_num_threads() == n_threads
    assert len(said) == len(rows)
    for row in rows:
        assert (row["n"], row["lost"]) == (3, 0)
        assert 0 <= row["missed"] <= 3
        quantiles_ms = row["quantiles_ms"]
        assert len(quantiles_ms) == len(latency.PERCENTS)
        assert quantiles_ms == sorted(quantiles_ms)
        # Quantiles are told to a microsecond.
        ends = (row["min_ms"], row["p50_ms"], row["max_ms"])
        at = [latency.PERCENTS.index(percent) for percent in (0, 50, 100)]
        assert [quantiles_ms[i] for i in at] == pytest.approx(ends, abs=6e-4)
        assert row["sent"]["p50_ms"] > row["p50_ms"] > 0
        assert row["columns"] == 15
        assert 0 < row["brain_voxels"] < np.prod(SHAPE)
    assert len(shown({"latency": rows}, latency)) == len(rows)


def test_more_than_scanners_give_is_left_out_by_name(two_paces, monkeypatch):
    monkeypatch.setattr(latency, "MOST_VOXELS_PER_S", 1e4)
    rows = latency.run(plan())["latency"]
    assert [row["skipped"] for row in rows if "every 0.05 s" in row["skipped"]] == [
        f"16x16x12, {name}, every 0.05 s: no scanner gives more than 0.01 million voxels a second"
        for name in ("ours, TCP", "folder, local")
    ]


def test_a_transport_whose_package_is_missing_is_left_out_by_name(two_paces, monkeypatch):
    monkeypatch.setattr(latency, "TRS_S", ())
    cstore = next(t for t in transports.TRANSPORTS if t.name.startswith("C-STORE"))
    monkeypatch.setattr(latency, "COMPARED", (cstore,))
    monkeypatch.setattr(latency, "can_pin", lambda: True)
    monkeypatch.setitem(sys.modules, "pynetdicom", None)
    (row,) = latency.run(plan())["latency"]
    assert row["skipped"].startswith("16x16x12, C-STORE, one association, every 0.05 s: ")
    assert "pynetdicom" in row["skipped"]


def test_a_scanner_that_cannot_send_says_why(two_paces, monkeypatch):
    monkeypatch.setattr(latency, "TRS_S", ())
    monkeypatch.setattr(latency, "COMPARED", (NOWHERE,))
    (row,) = [row for row in latency.run(plan())["latency"] if "nowhere" in row["skipped"]]
    assert "target must be" in row["skipped"]
    monkeypatch.setattr(transports, "TRANSPORTS", (NOWHERE,))
    monkeypatch.setattr(transports, "SHAPES", (SHAPE,))
    (row,) = transports.run(plan())["transports"]
    assert row["skipped"].startswith("nowhere: target must be")


@needs_pinning
def test_a_busy_neighbour_has_one_of_our_processors_and_goes():
    with latency.with_neighbour(latency.BUSY) as pid:
        (processor,) = os.sched_getaffinity(pid)
        assert processor in os.sched_getaffinity(0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with latency.with_neighbour(latency.IDLE) as nobody:
        assert nobody is None


def test_without_pinning_the_busy_neighbour_is_left_out_by_name(two_paces, monkeypatch):
    monkeypatch.setattr(latency, "can_pin", lambda: False)
    monkeypatch.setattr(latency, "TRS_S", (0.05,))
    monkeypatch.setattr(latency, "COMPARED", ())
    skipped, row = latency.run(plan())["latency"]
    assert skipped == {"skipped": latency.NO_PINNING}
    assert row["neighbour"] == "idle"


@pytest.mark.parametrize("module", [latency, sustained, soak])
def test_without_h5py_there_is_no_session(module, monkeypatch):
    monkeypatch.setattr(latency, "find_spec", lambda name: None)
    found = module.run(plan())
    assert list(found.values()) == [[{"skipped": "h5py is not installed"}]]
    (table,) = benchmarks.table({"tables": found})
    assert "skipped: h5py is not installed" in table.title


class Machine:
    """Takes so many seconds for a volume, and a *stall* once in a run of *long_s*."""

    def __init__(self, takes_s, stall_s=0.0, long_s=100.0):
        self.takes_s, self.stall_s, self.long_s = takes_s, stall_s, long_s
        self.tried = []

    def __call__(self, tr_s, seconds):
        self.tried.append((tr_s, seconds))
        worst_s = max(self.takes_s, self.stall_s if seconds >= self.long_s else 0.0)
        late_s = worst_s if worst_s > tr_s else None
        n = round(seconds / tr_s)
        return Attempt(tr_s, np.full(n if late_s is None else n // 2, self.takes_s), late_s, {})


@pytest.mark.parametrize("start_s", [0.5, 0.021, 0.003])
def test_the_smallest_tr_is_found_by_short_trials_and_then_kept_for_long(start_s):
    machine = Machine(takes_s=0.02)
    (found,) = sustained.search(machine, start_s, 100.0)
    assert found.late_s is None
    assert 0.02 <= found.tr_s < 0.02 * sustained.STEP
    *trials, last = machine.tried
    assert last == (found.tr_s, 100.0)
    assert {seconds for _, seconds in trials} == {100.0 * sustained.TRIAL}


def test_after_a_stall_the_tr_is_longer_than_it():
    first, second = sustained.search(Machine(0.02, stall_s=0.09), 0.05, 100.0)
    assert (first.late_s, second.late_s) == (0.09, None)
    assert second.tr_s == pytest.approx(0.09 * sustained.MARGIN)


def test_after_a_volume_that_is_late_at_once_the_tr_is_the_next_one():
    kept = Machine(0.02)

    def slow_start(tr_s, seconds):
        if seconds == 100.0 and tr_s < 0.03:
            return Attempt(tr_s, np.full(9, 0.02), 0.5, {})
        return kept(tr_s, seconds)

    *failed, found = sustained.search(slow_start, 0.02, 100.0)
    steps = [after.tr_s / before.tr_s for before, after in itertools.pairwise([*failed, found])]
    assert steps == pytest.approx([sustained.STEP] * len(failed))
    assert 0.03 <= found.tr_s < 0.03 * sustained.STEP


def test_attempts_end_when_their_time_is_over():
    def hopeless(tr_s, seconds):
        return Attempt(tr_s, np.full(round(seconds / tr_s / 2), tr_s), 2 * tr_s, {})

    attempts = sustained.search(hopeless, 1e-3, 100.0)
    assert attempts[-1].late_s is not None
    assert len(attempts) > 1
    assert sum(a.seconds for a in attempts) <= sustained.LONGEST * 100.0


def test_a_tr_is_sustained(monkeypatch):
    monkeypatch.setattr(sustained, "_estimate_s", lambda *_: 0.1)
    monkeypatch.setattr(sustained, "_MOST_TRIALS", 1)
    monkeypatch.setattr(sustained, "_FEWEST", 5)
    monkeypatch.setattr(sustained, "neighbours", lambda: ("idle",))
    rows = sustained.run(plan(minutes=1e-3))["sustained"]
    (row,) = [row for row in rows if "skipped" not in row]
    assert row["n"] >= 5
    assert row["missed"] == 0
    assert row["max_ms"] <= row["tr_ms"]
    assert row["minutes"] == pytest.approx(row["n"] * row["tr_ms"] / 60e3)
    assert len(shown({"sustained": rows}, sustained)) == 1


def test_transports_are_measured_at_both_ends(monkeypatch):
    monkeypatch.setattr(transports, "SHAPES", (SHAPE,))
    monkeypatch.setattr(transports, "N_VOLUMES", 8)
    monkeypatch.setattr(transports, "PACE_S", 0.02)
    monkeypatch.setattr(transports, "TRANSPORTS", transports.TRANSPORTS[:4])
    rows = transports.run(plan())["transports"]
    assert [row["transport"] for row in rows] == [t.name for t in transports.TRANSPORTS]
    for row in rows:
        assert (row["n"], row["lost"]) == (3, 0)
        assert 0 < row["last_byte"]["p50_ms"] <= row["last_byte"]["p95_ms"] < 1000
        assert row["last_byte"]["p50_ms"] < row["first_byte"]["p50_ms"]
    assert len(shown({"transports": rows}, transports)) == len(rows)


@pytest.mark.skipif(not soak._PROCESS.exists(), reason="there is no /proc here")
def test_soak_records_run_after_run_and_keeps_nothing(monkeypatch):
    monkeypatch.setattr(soak, "RECORDING_BYTES", 0)
    monkeypatch.setattr(soak, "WARM_UP", 8)
    # 0.02 s a volume, however fast this machine is.
    ticks = itertools.count(step=0.02)
    monkeypatch.setattr(soak, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    rows = soak.run(plan(minutes=0.02))["soak"]
    assert [row["what"] for row in rows] == [soak.ONE_RUN, soak.RECORDED]
    for row in rows:
        assert row["minutes"] == pytest.approx(0.01)
        assert row["volumes_per_s"] == pytest.approx(row["n"] / row["minutes"] / 60)
        assert 0 < row["start"]["resident_mb"] <= row["most_resident_mb"]
        assert row["start"]["files"] == row["end"]["files"]
        for name in ("p50_ms", "p99_ms"):
            ratio = row["last"][name] / row["first"][name]
            assert row["last_to_first"][name] == pytest.approx(ratio)
    one, recorded = rows
    assert one["runs"] == 1
    assert recorded["n"] == one["n"] == 30
    assert recorded["runs"] == 3  # of 16 volumes, 8 of which were not watched
    assert len(shown({"soak": rows}, soak)) == 2


def test_a_watch_sees_growth_and_slowing_down(monkeypatch):
    clock = SimpleNamespace(now_s=0.0)
    monkeypatch.setattr(soak, "time", SimpleNamespace(perf_counter=lambda: clock.now_s))
    watch = soak.Watch(minutes=1.0, device="cpu")
    monkeypatch.setattr(soak, "resident_mb", lambda: 100 + 0.001024 * watch.n_volumes)
    monkeypatch.setattr(soak, "_count", lambda what: 5)
    over = False
    while not over:
        clock.now_s += 0.005
        over = watch.add(2.0 if clock.now_s < 30 else 4.0)
    row = watch.row()
    assert row["n"] == pytest.approx(12_000, abs=2)
    assert row["volumes_per_s"] == pytest.approx(200, rel=1e-3)
    # 1024 bytes a volume; percentiles are exact to 2 %.
    assert row["kib_per_1000"] == pytest.approx(1000)
    assert row["last_to_first"]["p50_ms"] == pytest.approx(2, rel=0.03)
    assert row["max_ms"] == 4
