"""Every signal against what float64 makes of the same volumes afterwards."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from memory import ACTIVE, EVENTS, GRID, MemoryReader, plain, volumes
from offline import Offline
from rtfmri.config import (
    Config,
    ConnectivitySettings,
    FeedbackSettings,
    GlmSettings,
    OrderSettings,
)
from rtfmri.errors import ConfigError
from rtfmri.feedback.signals import Connectivity, Eigenvariate
from rtfmri.pipeline import Result
from rtfmri.recording import open_recording
from rtfmri.session import Session
from rtfmri.stages.readout import Readout

Floats = NDArray[np.float64]
N = 50
PSC_ERROR = 100 * N * 2.0**-24
"""Of a PSC: a mean of float32 is off by at most one rounding a volume."""


def region(*part: slice) -> NDArray[np.float32]:
    weights = np.zeros(GRID.shape, np.float32)
    weights[part] = 1
    return weights


ROIS = {
    "active": region(*ACTIVE),
    "still": region(slice(6, 9), slice(0, 4), slice(0, 3)),
    "third": region(slice(0, 2), slice(4, 8), slice(4, 7)),
}


def settings(**signals: dict[str, Any]) -> FeedbackSettings:
    return FeedbackSettings(signals=signals)


def run(
    given: FeedbackSettings, items: Sequence[Any] | None = None, **more: Any
) -> tuple[list[Result], Session]:
    reader = MemoryReader(items or volumes(N), live=more.pop("live", False))
    config = plain(feedback=given, **more)
    with Session(reader, events=EVENTS, rois=ROIS, config=config) as session:
        return list(session), session


def values(results: Sequence[Result], name: str) -> Floats:
    found = []
    for result in results:
        assert result.feedback is not None
        found.append(result.feedback.signals[name])
    return np.array(found)


def offline(results: Sequence[Result], run: Sequence[Any]) -> Offline:
    return Offline.of(run, ROIS, [result.conditions for result in results])


@pytest.mark.parametrize("of", ["psc", "z"])
def test_activity_differential_median(of: str) -> None:
    results, _ = run(
        settings(
            a={"kind": "activity", "roi": "active", "measure": of},
            m={"kind": "activity", "roi": "active", "measure": of, "summary": "median"},
            d={"kind": "differential", "plus": "active", "minus": "still", "measure": of},
        )
    )
    reference = offline(results, volumes(N))
    active, still = (reference.activity(name, of) for name in ("active", "still"))
    # z divides by the sd, of a region 1 here, where PSC divides by 1000 / 100.
    error = PSC_ERROR if of == "psc" else 10 * PSC_ERROR / reference.signal("active")[:5].std()
    assert np.isnan(values(results, "a"))[:2].all()
    median = reference.median("active", of)
    for name, wanted in (("a", active), ("m", median), ("d", active - still)):
        got = values(results, name)
        np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
        np.testing.assert_allclose(got, wanted, atol=2 * error, rtol=2e-4)
        assert np.nanmax(np.abs(got)) > 1


@pytest.mark.parametrize("of", ["psc", "z"])
def test_eigenvariate_is_the_batch_singular_vector_of_the_volumes_so_far(of: str) -> None:
    results, _ = run(
        settings(e={"kind": "activity", "roi": "active", "measure": of, "summary": "eigenvariate"})
    )
    reference = offline(results, volumes(N))
    wanted = reference.eigenvariate("active", of)
    got = values(results, "e")
    # With the task on, the first direction is far from the second: errors stay what they are.
    np.testing.assert_allclose(got[15:], wanted[15:], atol=20 * PSC_ERROR, rtol=2e-3)
    assert np.isnan(got[:2]).all()
    assert np.corrcoef(got[15:], reference.activity("active", of)[15:])[0, 1] > 0.95


def test_eigenvariate_of_equal_voxels_is_their_value() -> None:
    signal = Eigenvariate("e", Readout(ROIS["active"], "psc", each=True))
    for value in (1.0, -2.0, 0.5):
        result: Any = SimpleNamespace(
            readouts={"e": np.full(18, value)}, quality=SimpleNamespace(usable=True)
        )
        assert signal.push(result) == pytest.approx(value, abs=1e-12)


def test_adjusted_is_what_a_batch_fit_of_drift_leaves() -> None:
    n = 60
    drifting = volumes(n)
    for i, volume in enumerate(drifting):
        volume.data[...] += np.int16(0.8 * i)
    results, session = run(
        settings(a={"kind": "activity", "roi": "active", "measure": "adjusted"}),
        drifting,
        glm=GlmSettings(drift="linear"),
    )
    assert session.pipeline is not None
    assert session.pipeline.design is not None
    design = session.pipeline.design
    rows, series = design.rows(n), offline(results, drifting).signal("active")
    nuisance = np.arange(rows.shape[1]) < design.conditions.start
    wanted = np.full(n, np.nan)
    for t in range(n):
        known = rows[: t + 1].any(axis=0)
        x, y = rows[: t + 1, known], series[: t + 1]
        if t + 1 > np.linalg.matrix_rank(x):
            beta = np.linalg.lstsq(x, y, rcond=None)[0]
            rest = y[-1] - x[-1, nuisance[known]] @ beta[nuisance[known]]
            wanted[t] = 100 * rest / beta[0]
    got = values(results, "a")
    np.testing.assert_array_equal(np.isnan(got), np.isnan(wanted))
    np.testing.assert_allclose(got, wanted, atol=2e-3)
    task = np.array([r.conditions == ("tap",) for r in results])
    assert got[task].mean() - got[offline(results, drifting).baseline][5:].mean() > 2


def test_adjusted_with_whitened_noise_is_close_to_that_without() -> None:
    found = []
    for noise in ("ols", "ar1"):
        results, _ = run(
            settings(a={"kind": "activity", "roi": "active", "measure": "adjusted"}),
            volumes(60),
            glm=GlmSettings(noise=noise, drift="linear", ar1_warm_up_volumes=30),
        )
        found.append(values(results, "a"))
    ols, ar1 = found
    np.testing.assert_allclose(ar1[:30], ols[:30], atol=1e-5)
    np.testing.assert_allclose(ar1[35:], ols[35:], atol=0.3)
    assert np.nanmax(ols) > 2


def pushed(signal: Connectivity, table: Floats, names: Sequence[str]) -> Floats:
    got = []
    for row in table:
        roi = {name: SimpleNamespace(filtered=x) for name, x in zip(names, row, strict=True)}
        result: Any = SimpleNamespace(roi=roi, quality=SimpleNamespace(usable=True))
        got.append(signal.push(result))
    return np.array(got)


def related(n: int) -> Floats:
    """Three signals: a third part of the first two is the last."""
    rng = np.random.default_rng(3)
    a, b, c = rng.normal(size=(3, n))
    return 1000 + np.column_stack([a + c, 0.5 * a + b + c, 2 * c])


def of_two(window: str, *given: str) -> ConnectivitySettings:
    return ConnectivitySettings(
        kind="connectivity", rois=("x", "y"), given=given, window=window, window_volumes=12
    )


def partial(table: Floats, weights: Floats) -> float:
    """Correlation of what a weighted fit of the third signal leaves of the others."""
    root = np.sqrt(weights)[:, None]
    x = np.column_stack([np.ones(len(table)), table[:, 2:]])
    rest = table[:, :2] - x @ np.linalg.lstsq(root * x, root * table[:, :2], rcond=None)[0]
    return float(np.average(rest[:, 0] * rest[:, 1], weights=weights)) / math.sqrt(
        np.average(rest[:, 0] ** 2, weights=weights) * np.average(rest[:, 1] ** 2, weights=weights)
    )


def test_sliding_connectivity_is_that_of_the_newest_volumes() -> None:
    table = related(40)
    got = pushed(Connectivity(of_two("sliding")), table[:, :2], ("x", "y"))
    assert np.isnan(got[:4]).all()
    for t in range(4, 40):
        wanted = np.corrcoef(table[max(0, t - 11) : t + 1, :2].T)[0, 1]
        assert got[t] == pytest.approx(wanted, abs=1e-9)


def test_exponential_connectivity_weighs_newer_volumes_more() -> None:
    table = related(40)
    got = pushed(Connectivity(of_two("exponential")), table[:, :2], ("x", "y"))
    gains = np.maximum(1 / np.arange(1, 41), 2 / 13)
    for t in range(4, 40):
        weights = gains[: t + 1] * np.cumprod([1, *(1 - gains[t:0:-1])])[::-1]
        covariance = np.cov(table[: t + 1, :2].T, aweights=weights, ddof=0)
        wanted = covariance[0, 1] / math.sqrt(covariance[0, 0] * covariance[1, 1])
        assert got[t] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("window", ["sliding", "exponential"])
def test_partial_connectivity_takes_a_third_region_out_of_both(window: str) -> None:
    table = related(40)
    got = pushed(Connectivity(of_two(window, "z")), table, ("x", "y", "z"))
    assert np.isnan(got[:5]).all()
    gains = np.maximum(1 / np.arange(1, 41), 2 / 13)
    for t in range(5, 40):
        rows = table[max(0, t - 11) : t + 1] if window == "sliding" else table[: t + 1]
        weights = np.ones(len(rows))
        if window == "exponential":
            weights = gains[: t + 1] * np.cumprod([1, *(1 - gains[t:0:-1])])[::-1]
        assert got[t] == pytest.approx(partial(rows, weights), abs=1e-8)


def test_connectivity_of_what_does_not_vary_or_is_given_twice_has_no_value() -> None:
    still = np.ones((20, 2))
    assert np.isnan(pushed(Connectivity(of_two("sliding")), still, ("x", "y"))).all()
    table = related(20)[:, [0, 1, 0]]
    assert np.isnan(pushed(Connectivity(of_two("sliding", "z")), table, ("x", "y", "z"))).all()


def test_connectivity_in_a_run_leaves_unusable_volumes_out() -> None:
    spiky = volumes(N)
    spiky[20].data[...] = np.int16(4000)
    given = settings(c={"kind": "connectivity", "rois": ["active", "still"], "window_volumes": 15})
    results, _ = run(given, spiky)
    usable = np.array([r.quality.usable for r in results])
    assert not usable[20]
    reference = offline(results, spiky)
    a, b = (reference.signal(name)[usable] for name in ("active", "still"))
    got = values(results, "c")
    assert np.isnan(got[20])
    wanted = [
        np.corrcoef(a[max(0, t - 14) : t + 1], b[max(0, t - 14) : t + 1])[0, 1]
        for t in range(4, usable.sum())
    ]
    np.testing.assert_allclose(got[usable][4:], wanted, atol=1e-6)


def test_without_settings_every_region_is_a_signal_and_the_first_is_shown() -> None:
    results, _ = run(FeedbackSettings())
    for result in results:
        assert result.feedback is not None
        assert list(result.feedback.signals) == list(ROIS)
        psc = {name: value.psc for name, value in result.roi.items()}
        np.testing.assert_equal(result.feedback.signals, psc)
        shown = np.clip(psc["active"], 0, 1)
        np.testing.assert_equal(result.feedback.shown, shown)


def test_custom_signals_from_a_file_a_module_and_a_class(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def twice(result):\n    return 2 * result.roi['active'].psc\n"
        "class Count:\n    def __init__(self): self.n = 0\n"
        "    def push(self, result):\n        self.n += 1\n        return self.n\n"
        "def nothing(result):\n    return None\n"
    )
    results, _ = run(
        settings(
            twice={"kind": "custom", "function": f"{file}:twice"},
            count={"kind": "custom", "function": f"{file}:Count"},
            nothing={"kind": "custom", "function": f"{file}:nothing"},
        )
    )
    np.testing.assert_array_equal(
        values(results, "twice"), [2 * r.roi["active"].psc for r in results]
    )
    assert values(results, "count").tolist() == list(range(1, N + 1))
    assert np.isnan(values(results, "nothing")).all()


def test_a_custom_signal_that_raises_gives_no_value_and_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(
        "def broken(result):\n    return 1 / (result.index % 5)\n"
        "def text(result):\n    return 'high'\n"
    )
    results, session = run(
        settings(
            a={"kind": "custom", "function": f"{file}:broken"},
            b={"kind": "custom", "function": f"{file}:text"},
        )
    )
    assert np.isnan(values(results, "a")).tolist() == [i % 5 == 0 for i in range(N)]
    assert session.summary()["failed_signals"] == {"a": N // 5, "b": N}
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert (
        sum("signal 'a' has no value at volume 0: ZeroDivisionError" in w for w in warnings) == 1
    )
    assert sum("signal 'b' has no value" in w for w in warnings) == 1


@pytest.mark.parametrize(
    ("signal", "says"),
    [
        ({"kind": "activity", "roi": "lef"}, "there is no ROI 'lef'; the ROIs are active, still"),
        (
            {"kind": "differential", "plus": "active", "minus": "x"},
            "there is no ROI 'x'",
        ),
        (
            {"kind": "connectivity", "rois": ["active", "active"]},
            "rois and given must be different regions",
        ),
        (
            {"kind": "activity", "roi": "active", "measure": "adjusted", "summary": "median"},
            "measure 'adjusted' is of a region's mean",
        ),
        ({"kind": "custom", "function": "no.such.module:f"}, "ModuleNotFoundError"),
        ({"kind": "custom", "function": "nothing_like_it"}, "is no entry point"),
        ({"kind": "custom", "function": "math:pi"}, "must be a function or a class with push"),
        ({"kind": "custom", "function": "math:nothing"}, "AttributeError"),
        ({"kind": "decoder", "file": "/nowhere.h5"}, "nowhere.h5"),
        ({"kind": "psc"}, "signals.s"),
        ({"kind": "activity", "roi": "active", "measure": "t"}, "signals.s"),
    ],
)
def test_what_cannot_be_is_said_before_the_run(signal: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(settings(s=signal))


def test_show_must_be_a_signal() -> None:
    with pytest.raises(ConfigError, match="show must be one of the signals active, still, third"):
        run(FeedbackSettings(show="other"))


def test_an_eigenvariate_of_too_many_voxels_is_refused() -> None:
    big = Readout(np.ones((20, 10, 6)), "psc", each=True)
    with pytest.raises(ConfigError, match="takes at most 1000 voxels, the region has 1200"):
        Eigenvariate("e", big)


def test_missing_volumes_have_no_value_or_that_of_the_one_before() -> None:
    given = settings(
        a={"kind": "activity", "roi": "active"},
        m={"kind": "activity", "roi": "active", "summary": "median"},
    )
    gappy = [v for v in volumes(30) if v.index not in (12, 13)]
    for hold in ("none", "hold"):
        results, _ = run(
            given, gappy, live=True, order=OrderSettings(window_volumes=0, feedback=hold)
        )
        assert [r.index for r in results if r.missing] == [12, 13]
        for name in ("a", "m"):
            got = values(results, name)
            if hold == "hold":
                assert got[12] == got[13] == got[11]
            else:
                assert np.isnan(got[12:14]).all()
            assert np.isfinite(got[14:]).all()


def test_the_recording_has_every_signal_and_what_was_shown(tmp_path: Path) -> None:
    given = settings(
        a={"kind": "activity", "roi": "active"},
        e={"kind": "activity", "roi": "active", "summary": "eigenvariate"},
    )
    config: Config = plain(feedback=given)
    with Session(
        MemoryReader(volumes(N)),
        events=EVENTS,
        rois=ROIS,
        config=config,
        out=tmp_path / "run.h5",
    ) as session:
        results = list(session)
    with open_recording(tmp_path / "run.h5") as recording:
        assert recording.signal_names == ("a", "e")
        assert recording.config.feedback == given
        for i, name in enumerate(recording.signal_names):
            np.testing.assert_array_equal(recording.signals[:, i], values(results, name))
        shown = [r.feedback.shown for r in results if r.feedback]
        np.testing.assert_array_equal(recording.shown, shown)
