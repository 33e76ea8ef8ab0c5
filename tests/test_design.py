"""The design matrix against nilearn's, and what is said of a design that cannot be."""

import re
from pathlib import Path

import numpy as np
import pytest

from rtfmri.config import BaselineSettings, Config, GlmSettings
from rtfmri.design import (
    MAX_CONTRASTS,
    MOTION_COLUMNS,
    Confounds,
    Design,
    check_design,
    read_confounds,
)
from rtfmri.errors import ConfigError
from rtfmri.paradigm import Event, Paradigm

pd = pytest.importorskip("pandas")
first_level = pytest.importorskip("nilearn.glm.first_level")

TR_S, N = 1.9, 120
EVENTS = tuple(
    Event(11.3 + 23 * i, 8.5 if i % 3 else 0.0, "see" if i % 2 else "tap") for i in range(9)
)


def design(events: tuple[Event, ...] = EVENTS, n_volumes: int | None = N, **settings: object):
    known = {
        name: settings.pop(name)
        for name in ("baseline", "confounds", "has_motion", "slice_time")
        if name in settings
    }
    return Design(Paradigm(events), GlmSettings(**settings), TR_S, n_volumes=n_volumes, **known)


@pytest.mark.parametrize("hrf", ["spm", "glover + derivative", "spm + derivative + dispersion"])
@pytest.mark.parametrize("drift", ["cosine", "linear", "none"])
def test_columns_are_nilearns(hrf: str, drift: str) -> None:
    table = pd.DataFrame(
        {
            "onset": [e.onset_s for e in EVENTS],
            "duration": [e.duration_s for e in EVENTS],
            "trial_type": [e.trial_type for e in EVENTS],
        }
    )
    with pytest.warns(UserWarning, match="duration"):  # of the events that have none
        wanted = first_level.make_first_level_design_matrix(
            (np.arange(N) + 0.5) * TR_S,
            table,
            hrf_model=hrf,
            drift_model={"linear": "polynomial", "none": None}.get(drift, "cosine"),
            high_pass=1 / 100,
        )
    made = design(hrf=hrf, drift=drift, high_pass_s=100, motion=False)
    rows = made.rows(N)
    assert set(made.columns) == set(wanted.columns)
    for column in wanted.columns:
        ours, theirs = rows[:, made.columns.index(column)], wanted[column].to_numpy()
        if column == "drift_1" and drift == "linear":  # another scale, and not centred
            assert abs(np.corrcoef(ours, theirs)[0, 1]) == pytest.approx(1)
        else:
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_the_order_of_the_columns_puts_what_is_asked_last() -> None:
    made = design(confounds=Confounds(np.zeros((N, 2)), ("pulse", "breath")))
    assert made.columns[0] == "constant"
    assert made.columns[-10:] == ("pulse", "breath", *MOTION_COLUMNS, "see", "tap")
    assert made.columns[made.motion_at] == "trans_x"
    assert [contrast.name for contrast in made.contrasts] == ["see", "tap"]
    assert design(motion=False).motion_at == design(has_motion=False).motion_at == -1


def test_a_row_does_not_depend_on_the_planned_length_but_for_its_drift() -> None:
    short, long = (design(n_volumes=n, drift="none") for n in (40, N))
    # nilearn's fine grid has 50 points a TR, and a response rises by some 0.4 in a TR.
    np.testing.assert_allclose(short.rows(N), long.rows(N), atol=0.4 / 50)


def test_volumes_beyond_the_plan_are_welcome() -> None:
    made = design(
        n_volumes=60, confounds=Confounds(np.ones((60, 1)) * np.arange(60)[:, None], ("c",))
    )
    rows = made.rows(2000)
    assert np.isfinite(rows).all()
    assert np.abs(rows).max() < 10
    assert not rows[1999, made.columns.index("c") :].any()
    # The cosines go on: mirrored about the planned end.
    drift = [i for i, name in enumerate(made.columns) if name.startswith("drift")]
    signs = (-1.0) ** np.arange(1, len(drift) + 1)
    np.testing.assert_allclose(rows[60:120, drift], signs * rows[:60, drift], atol=1e-12)


def test_without_a_plan_the_events_say_how_long_the_run_is() -> None:
    end_s = max(e.onset_s + e.duration_s for e in EVENTS)
    planned = design(n_volumes=int(np.ceil(end_s / TR_S)))
    assert np.array_equal(design(n_volumes=None).rows(N), planned.rows(N))


def test_slice_timing_moves_the_moment() -> None:
    late, early = (design(slice_time=at, drift="none").rows(N)[:, -1] for at in (0.5, 0.0))
    fine = (np.arange(N) + 0.5) * TR_S, np.arange(N) * TR_S
    np.testing.assert_allclose(np.interp(fine[1], fine[0], late)[1:], early[1:], atol=0.12)
    assert np.abs(late - early).max() > 0.05


@pytest.mark.parametrize(
    ("expression", "weights"),
    [
        ("tap - see", {"tap": 1, "see": -1}),
        ("0.5*tap + see/2", {"tap": 0.5, "see": 0.5}),
        ("-(tap + 2*see)", {"tap": -1, "see": -2}),
        ("trans_x", {"trans_x": 1}),
        ("drift_1 - constant", {"drift_1": 1, "constant": -1}),
    ],
)
def test_contrasts_in_nilearns_syntax(expression: str, weights: dict[str, float]) -> None:
    (contrast,) = design(contrasts={"asked": expression}).contrasts
    assert contrast.kind == "t"
    found = dict(zip(design().columns, contrast.weights[0], strict=True))
    assert {name: weight for name, weight in found.items() if weight} == weights


def test_a_named_baseline_is_what_conditions_are_compared_with() -> None:
    events = tuple(Event(20.0 * i, 20, ("rest", "left hand", "see")[i % 3]) for i in range(12))
    made = Design(
        Paradigm(events, baseline=BaselineSettings(condition="rest")),
        GlmSettings(),
        TR_S,
        baseline=BaselineSettings(condition="rest"),
    )
    assert [c.name for c in made.contrasts] == ["left hand", "see"]
    at = made.columns.index
    assert made.contrasts[0].weights[0, at("left hand")] == 1
    assert made.contrasts[0].weights[0, at("rest")] == -1


def test_f_contrasts() -> None:
    tap, any_of = design(contrasts={"tap": "tap"}, f_contrasts={"any": ("tap", "see")}).contrasts
    assert (tap.kind, any_of.kind) == ("t", "F")
    assert any_of.weights.shape == (2, len(design().columns))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contrasts": {"x": "tap - rest"}}, "contrast 'x' .* got 'tap - rest'; the columns are"),
        ({"contrasts": {"x": "tap -"}}, "contrast 'x' must be a sum of columns"),
        ({"contrasts": {"x": "tap - tap"}}, "must not be 0 everywhere"),
        ({"contrasts": {"x": "__import__('os').getpid()"}}, "names of columns, numbers"),
        ({"contrasts": {"x": "abs(tap)"}}, "names of columns, numbers"),
        ({"contrasts": {"x": "tap.sum"}}, "names of columns, numbers"),
        ({"contrasts": {"x": "3"}}, "must be a sum of columns"),
        ({"f_contrasts": {"x": ("tap", "2*tap")}}, "linearly independent contrasts"),
        ({"f_contrasts": {"x": ()}}, "linearly independent contrasts"),
        ({"contrasts": {"x": "tap"}, "f_contrasts": {"x": ("see",)}}, "a name of its own"),
        (
            {"contrasts": {f"c{i}": "tap" for i in range(MAX_CONTRASTS + 1)}},
            "at most 64 contrasts, got 65",
        ),
    ],
)
def test_what_cannot_be_asked_is_said(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_design(Paradigm(EVENTS), Config(glm=GlmSettings(**settings)), None)


def test_what_depends_on_the_tr_is_not_judged_before_it_is_known() -> None:
    # 5000 volumes make 156 cosines if the TR is 2 s, and 31 if it is 0.4 s.
    settings = GlmSettings(contrasts={"slow": "drift_20"})
    check_design(Paradigm(EVENTS), Config(glm=settings), None, 5000)
    Design(Paradigm(EVENTS), settings, 0.4, n_volumes=5000)
    with pytest.raises(ConfigError, match="at most 128 columns"):
        check_design(Paradigm(EVENTS), Config(glm=settings, tr_s=2.0), None, 5000)
    with pytest.raises(ConfigError, match="the columns are"):
        check_design(Paradigm(EVENTS), Config(glm=settings, tr_s=0.4), None, 500)


def test_names_must_differ_and_be_few_enough() -> None:
    with pytest.raises(ConfigError, match="got tap twice"):
        design(confounds=Confounds(np.zeros((N, 1)), ("tap",)))
    many = tuple(f"c{i}" for i in range(128))
    with pytest.raises(ConfigError, match="at most 128 columns, got 140"):
        design(confounds=Confounds(np.zeros((N, 128)), many))


def test_conditions_after_the_end_are_named() -> None:
    made = design((*EVENTS, Event(N * TR_S + 40, 10, "late")))
    assert made.silent == ("late",)
    assert not design().silent


def test_nothing_is_checked_where_there_is_no_glm() -> None:
    bad = GlmSettings(contrasts={"x": "nonsense"})
    check_design(Paradigm(()), Config(glm=bad), None)
    check_design(Paradigm(EVENTS), Config(glm=bad.model_copy(update={"noise": "off"})), None)


def test_confounds_are_read_and_standardised(tmp_path: Path) -> None:
    path = tmp_path / "confounds.tsv"
    lines = ["pulse\tcsf\tflat\tunknown", "n/a\t10\t5\tn/a"]
    lines += [f"{i}\t{10 + i}\t5\tn/a" for i in (1, 2, 3)]
    path.write_text("\n".join(lines) + "\n")
    table = read_confounds(path)
    assert table.names == ("pulse", "csf", "flat", "unknown")
    made = design(confounds=table)
    got = made.rows(4)[:, [made.columns.index(name) for name in table.names]]
    csf = np.array([10, 11, 12, 13])
    np.testing.assert_allclose(got[:, 0], np.array([0, -1, 0, 1]) / np.std([1, 2, 3]))
    np.testing.assert_allclose(got[:, 1], (csf - csf.mean()) / csf.std())
    assert not got[:, 2:].any()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "a header and a line a volume"),
        ("a\tb\n", "a header and a line a volume"),
        ("a\tb\n1\n", "line 2: 2 cells expected, got 1"),
        ("a\n1\nx\n", "line 3: cells must be finite numbers or n/a, got 'x'"),
        ("a\ninf\n", "line 2: cells must be finite"),
    ],
)
def test_a_bad_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "confounds.tsv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"{re.escape(str(path))}.*{words}"):
        read_confounds(path)


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"glm.confounds: cannot read"):
        read_confounds(tmp_path / "none.tsv")
