"""The suite of outputs: every way to a program in another process, with what is lost counted."""

import importlib
import json
from typing import Any

import pytest

from rtfmri.cli import load_benchmarks

benchmarks = load_benchmarks()
outputs, tables = (
    importlib.import_module(f"{benchmarks.__name__}.{name}") for name in ("outputs", "tables")
)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "N", 40)
        patch.setattr(outputs, "FIRST", 5)
        patch.setattr(outputs, "PACE_S", 0.005)
        patch.setattr(outputs, "WAYS", [way for way in outputs.WAYS if way.kind != "lsl"])
        report = benchmarks.run(device="cpu", grids=[(16, 16, 12)], suites=["outputs"])
    found: list[dict[str, Any]] = json.loads(json.dumps(report, allow_nan=False))["tables"][
        "outputs"
    ]
    return found


def test_every_output_brings_every_message(rows: list[dict[str, Any]]) -> None:
    measured = [row for row in rows if "skipped" not in row]
    assert {"TCP", "TCP, beside clients that never read", "UDP"} <= {r["output"] for r in measured}
    for row in measured:
        assert (row["n"], row["lost"]) == (35, 0), row["output"]
        assert 0 < row["latency"]["p50_ms"] <= row["latency"]["p99_ms"]
        # Handing over is a part of the way.
        assert 0 < row["send"]["p50_ms"] < row["latency"]["max_ms"]
    assert len(tables.cells(benchmarks.LAYOUTS["outputs"], rows)) == len(measured)


def test_what_is_not_installed_is_skipped_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    way = outputs.Way("Nothing", "nothing:", "zmq", "no_such_package")
    monkeypatch.setattr(outputs, "WAYS", [way])
    plan: Any = type("Plan", (), {"progress": staticmethod(lambda step: None)})
    assert outputs.run(plan) == {
        "outputs": [{"skipped": "Nothing: no_such_package is not installed"}]
    }
