import copy
import importlib
import json
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from rtfmri import cli
from rtfmri.errors import ConfigError

benchmarks = cli.load_benchmarks()
compare, figures, kernels, latency, measure = (
    importlib.import_module(f"{benchmarks.__name__}.{name}")
    for name in ("compare", "figures", "kernels", "latency", "measure")
)


def times(median_ms, noise=0.02, **more):
    return {"median_ms": median_ms, "min_ms": 0.9 * median_ms, "noise": noise, **more}


def report(*, fold_ms=1.0, stream_gb_s=20.0, noise=0.02, **tables):
    stream = {"stream_gb_s": stream_gb_s}
    operations = {"fold": fold_ms, "compare": 2.0, "gather": 0.5}
    rows = [
        {
            "grid": "64x64x36",
            "operation": operation,
            "n": 147456,
            "bytes_per_voxel": 18.0,
            "memory_bound": True,
            "hot": times(ms, noise, gb_s=2.6 / ms, share=0.13 / ms, **stream),
            "cold": times(1.5 * ms, noise, gb_s=1.7 / ms, share=0.08 / ms, **stream),
        }
        for operation, ms in operations.items()
    ]
    return {
        "format": benchmarks.FORMAT,
        "date": "2026-01-01",
        "rtfmri": "0.1.0",
        "revision": "abc",
        "device": "cpu",
        "machine": {"cpu": "Xeon", "threads": 2, "gpu": None},
        "tables": {"kernels": rows, **tables},
    }


def kinds(old, new):
    return [(change.kind, change.what) for change in compare.compare(old, new).changes]


FOLD = ("kernels", "64x64x36", "fold")


def test_a_report_does_not_differ_from_itself():
    found = compare.compare(report(), report())
    assert (found.changes, found.n_judged, found.machine) == ([], 6, 1.0)
    assert not found.slower


def test_a_fifth_more_is_slower_and_a_fifth_less_faster():
    slower = compare.compare(report(), report(fold_ms=1.2))
    assert [(c.kind, c.what) for c in slower.changes] == [
        ("slower", (*FOLD, "hot")),
        ("slower", (*FOLD, "cold")),
    ]
    assert slower.changes[0].ratio == pytest.approx(1.2)
    assert slower.changes[0].noise == pytest.approx(0.02 * 2**0.5)
    assert slower.slower
    faster = compare.compare(report(fold_ms=1.2), report())
    assert [change.kind for change in faster.changes] == ["faster", "faster"]
    assert not faster.slower


@pytest.mark.parametrize(("fold_ms", "noise"), [(1.08, 0.0001), (1.2, 0.1), (0.93, 0.0001)])
def test_what_noise_or_chance_allows_is_no_change(fold_ms, noise):
    assert kinds(report(noise=noise), report(fold_ms=fold_ms, noise=noise)) == []


def test_what_the_machine_itself_lost_is_not_held_against_the_code():
    slow_machine = report(fold_ms=1.3, stream_gb_s=16.0)
    assert kinds(report(), slow_machine) == []
    assert compare.compare(report(), slow_machine).machine == pytest.approx(1.25)
    worse = report(fold_ms=1.6, stream_gb_s=16.0)
    assert sorted(kinds(report(), worse)) == [
        ("slower", (*FOLD, "cold")),
        ("slower", (*FOLD, "hot")),
    ]
    # A slower machine alone makes nothing faster.
    assert kinds(report(stream_gb_s=10.0), report(stream_gb_s=20.0)) == []


def test_rows_without_a_stream_are_held_against_that_of_the_whole_report():
    def chain(ms):
        step = {"p50_ms": ms, "p99_ms": 9.0, "min_ms": 0.9 * ms, "noise": 0.02}
        return [{"grid": "64x64x36", "step": "total", "hot": step}]

    old = report(chain=chain(3.0))
    assert kinds(old, report(chain=chain(3.6))) == [
        ("slower", ("chain", "64x64x36", "total", "hot"))
    ]
    assert kinds(old, report(chain=chain(3.6), stream_gb_s=16.0)) == []


def test_a_median_whose_fastest_call_stayed_is_a_neighbours_doing():
    new = report(fold_ms=1.4)
    for caches in ("hot", "cold"):
        new["tables"]["kernels"][0][caches]["min_ms"] /= 1.4
    assert kinds(report(), new) == []


def test_too_few_calls_are_counted_and_not_judged():
    found = compare.compare(report(noise=0.0), report(fold_ms=3.0))
    assert (found.changes, found.n_judged, found.n_unjudged) == ([], 0, 6)
    assert "6 timed too rarely to tell their noise" in compare.conclusion(found)


def test_worst_comes_first():
    new = report(fold_ms=1.5)
    for caches in ("hot", "cold"):
        for name in ("median_ms", "min_ms"):
            new["tables"]["kernels"][1][caches][name] *= 3
            new["tables"]["kernels"][2][caches][name] /= 2
    found = compare.compare(report(), new).changes
    assert [change.kind for change in found] == ["slower"] * 4 + ["faster"] * 2
    assert [change.what[2] for change in found] == ["compare"] * 2 + ["fold"] * 2 + ["gather"] * 2


def test_what_one_report_alone_has_is_named_by_as_little_as_tells_it():
    old, new = (
        report(),
        report(scaling=[{"axis": "voxels", "size": 9, "steps": {"roi": times(1)}}]),
    )
    del new["tables"]["kernels"][1]
    old["tables"]["kernels"].append({**old["tables"]["kernels"][0], "grid": "8x8x8"})
    assert kinds(old, new) == [
        ("new", ("scaling",)),
        ("gone", ("kernels", "64x64x36", "compare")),
        ("gone", ("kernels", "8x8x8")),
    ]


def test_rows_are_known_by_sizes_where_words_are_the_same():
    def scaling(large_ms):
        sizes = {10: 1.0, 1000: large_ms}
        return [
            {"axis": "regions", "size": n, "steps": {"roi": times(ms)}} for n, ms in sizes.items()
        ]

    assert kinds(report(scaling=scaling(1.0)), report(scaling=scaling(2.0))) == [
        ("slower", ("scaling", "regions", "size 1000", "steps", "roi"))
    ]


def test_a_peer_that_became_slower_is_not_ours():
    def smoothing(ours_ms, scipy_ms):
        tools = {"rtfmri": ours_ms, "scipy.ndimage": scipy_ms}
        return [{"grid": "8x8x8", "tool": tool, **times(ms)} for tool, ms in tools.items()]

    old, new = report(smoothing=smoothing(1, 9)), report(smoothing=smoothing(2, 18))
    assert kinds(old, new) == [("slower", ("smoothing", "8x8x8", "rtfmri"))]


def test_rows_that_cannot_be_told_apart_are_refused():
    new = report()
    new["tables"]["kernels"] *= 2
    with pytest.raises(ConfigError, match=r"rows must differ by their words, got .*fold"):
        compare.compare(report(), new)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cuda"}, "device cpu and cuda"),
        ({"machine": {"cpu": "EPYC", "threads": 2, "gpu": None}}, "cpu Xeon and EPYC"),
        ({"machine": {"cpu": "Xeon", "threads": 8, "gpu": None}}, "threads 2 and 8"),
        (
            {"machine": {"cpu": "Xeon", "threads": 2, "gpu": {"name": "H100"}}},
            "gpu None and H100",
        ),
    ],
)
def test_other_machines_are_refused_by_what_differs(change, words):
    with pytest.raises(ConfigError, match=f"one machine and device, got {words}$"):
        compare.compare(report(), report() | change)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `rtfmri bench --json` writes of a small grid, and what it says."""
    file = tmp_path_factory.mktemp("bench") / "new.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "HOT_TURN", 2)
        patch.setattr(measure, "beyond_caches_bytes", lambda: 12_000)
        arguments = ["--suite", "kernels", "--grid", "16x16x12", "--device", "cpu"]
        done = rtfmri("bench", *arguments, "--json", file)
    return file, done


def rtfmri(*arguments, expect=0):
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if expect == 0 and done.exception:
        raise done.exception
    assert done.exit_code == expect
    return done


def written(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def test_bench_writes_a_report_that_compare_takes(measured):
    file, done = measured
    assert "subtract" in done.stdout
    found = json.loads(rtfmri("bench", "compare", file, file, "--json").stdout)
    n_operations = len(json.loads(file.read_text())["tables"]["kernels"])
    # Hot and cold; a noise of exactly 0 is none.
    assert found["n_judged"] + found["n_unjudged"] == 2 * n_operations
    assert found["changes"] == []


def test_compare_exits_with_1_if_something_is_slower_and_0_otherwise(tmp_path):
    old = written(tmp_path / "old.json", report())
    new = written(tmp_path / "new.json", report(fold_ms=1.5))
    assert "2 slower" in rtfmri("bench", "compare", old, new, expect=1).stdout
    assert "2 faster" in rtfmri("bench", "compare", new, old).stdout
    found = json.loads(rtfmri("bench", "compare", old, new, "--json", expect=1).stdout)
    assert found["slower"] is True
    assert found["changes"][0]["what"] == [*FOLD, "hot"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read the report in "),
        ("{", "cannot read the report in "),
        ("[]", "must hold a report of format .*, got None"),
        ('{"format": "rtfmri-benchmark-1"}', "got rtfmri-benchmark-1"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, content, words):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        compare.read_report(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "speed"], "suites must be of kernels, .* got speed"),
        (["--grid", "64x64"], "--grid must be like 64x64x36, got '64x64'"),
        (["--grid", "64x0x36"], "--grid must have positive sides"),
        (["--json", "no/such/folder/new.json"], "--json must be in a folder that is there"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_measured(monkeypatch, arguments, words):
    monkeypatch.setitem(benchmarks._MODULES, "kernels", None)  # which no run would survive
    with pytest.raises(ConfigError, match=words):
        rtfmri("bench", "--device", "cpu", *arguments)


def test_what_is_measured_is_written_after_each_suite(monkeypatch, tmp_path):
    def broken(plan):
        raise ConfigError("the second suite broke")

    monkeypatch.setattr(measure, "HOT_TURN", 2)
    monkeypatch.setattr(measure, "beyond_caches_bytes", lambda: 12_000)
    monkeypatch.setitem(benchmarks._MODULES, "chain", (SimpleNamespace(run=broken),))
    file = tmp_path / "new.json"
    suites = ["--suite", "kernels", "--suite", "chain"]
    with pytest.raises(ConfigError, match="the second suite broke"):
        rtfmri("bench", *suites, "--grid", "8x8x6", "--device", "cpu", "--json", file)
    assert list(compare.read_report(file)["tables"]) == ["kernels"]


def test_python_m_benchmarks_compares_and_refuses(monkeypatch, capsys, tmp_path):
    module = importlib.import_module(f"{benchmarks.__name__}.__main__")

    def said(*arguments, status):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == status
        return "".join(capsys.readouterr())

    old = written(tmp_path / "old.json", report())
    new = written(tmp_path / "new.json", report(fold_ms=1.5))
    line = "slower | 1.50 | 3% | 1.00 | 1 | 1.5 | kernels, 64x64x36, fold, hot"
    assert line in said("compare", old, new, status=1)
    assert said("compare", old, old, status=0).startswith("0 slower")
    monkeypatch.setattr(sys, "argv", ["benchmarks", "compare", str(old), "none.json"])
    with pytest.raises(SystemExit, match="error: cannot read the report in none"):
        module.main()
    assert "must be like 64x64x36, got '3x4'" in said("--grids", "3x4", status=2)
    assert "must be above 0, got 0" in said("--rounds", "0", status=2)


def test_pictures_are_drawn_of_what_a_report_has(measured, tmp_path):
    pytest.importorskip("matplotlib")
    file, _ = measured
    done = rtfmri("bench", "figures", file, "--out", tmp_path / "pictures")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["roofline.png"]
    assert "no latency.png: the report has nothing of latency" in " ".join(done.stdout.split())


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


def test_roofline_counts_what_reaches_the_bound():
    rows = report()["tables"]["kernels"]
    for row, share in zip(rows, (0.69, 0.7, 0.9), strict=True):
        row["hot"]["share"] = row["cold"]["share"] = share
    rows[2]["memory_bound"] = False
    assert any(
        "1 (caches hot) and 1 (cold) of 2 memory-bound cases reach 70%" in text
        for text in texts(figures.roofline({"kernels": rows}))
    )


def test_peers_are_drawn_with_what_they_are_called_and_times_ours():
    stages = {"whole chain": 44.4, "decode": 0.71, "smoothing": 11.6}
    rows = [
        {
            "grid": "64x64x36",
            "stage": stage,
            "median_ms": 2.0,
            "peer": f"peer of {stage}",
            "peer_ms": 2.0 * ratio,
            "times": ratio,
        }
        for stage, ratio in stages.items()
    ]
    rows.append({**rows[0], "grid": "8x8x8", "times": 99.0})
    figure = figures.peers({"peers": rows})
    found = texts(figure)
    assert {"peer of decode, 0.7 times ours", "peer of smoothing, 12 times ours"} <= set(found)
    assert any("the whole chain 44, its stages 0.7 to 12" in text for text in found)
    assert sorted(bar.get_width() for bar in figure.axes[0].patches) == pytest.approx(
        [1.42, 2, 2, 2, 23.2, 88.8]
    )


def latency_row(transport, tr_ms, neighbour, slowest_ms, grid="64x64x36"):
    quantiles_ms = [slowest_ms * (1 + percent) / 101 for percent in latency.PERCENTS]
    return {
        "grid": grid,
        "transport": transport,
        "tr_ms": tr_ms,
        "neighbour": neighbour,
        "n": 200,
        "quantiles_ms": quantiles_ms,
        "p50_ms": quantiles_ms[50],
        "p99_ms": quantiles_ms[99],
    }


def test_latency_shows_the_largest_grid_and_tails_as_far_as_volumes_tell():
    tcp, common_ms = latency.TCP.name, 1e3 * latency.COMMON_S
    rows = [
        latency_row(tcp, common_ms, latency.IDLE, 900.0, grid="8x8x8"),
        latency_row(tcp, common_ms, latency.IDLE, 10.0),
        latency_row(tcp, common_ms, latency.BUSY, 40.0),
        latency_row("MRD", common_ms, latency.IDLE, 20.2),
        latency_row(tcp, 100.0, latency.IDLE, 10.1),
    ]
    figure = figures.latency({"latency": rows})
    # The title tells of no busy neighbour; 100 of 101 parts of 20.2 ms.
    assert any("99 of 100 volumes are answered within 20 ms" in text for text in texts(figure))
    left, right = figure.axes
    assert len(left.lines) == 3
    assert min(left.lines[0].get_ydata()) == pytest.approx(0.5)  # 1 of 200
    idle = right.lines[0]
    assert sorted(idle.get_xdata()) == [100.0, common_ms]


def test_scaling_names_the_exponents_of_each_panel():
    sizes = (1000, 2000, 4000)
    rows = [
        {"axis": axis, "grid": "8x8x8", "size": n, "steps": {"total": {"p50_ms": 1e-3 * n}}}
        for axis in ("voxels", "regions")
        for n in sizes
    ]
    fits = [
        {"axis": axis, "grid": grid, "steps": {"total": {"exponent": exponent}}}
        for axis, grid, exponent in (("voxels", "all", 0.97), ("regions", "8x8x8", 0.31))
    ]
    flat = [
        {"grid": "8x8x8", "baseline": "fixed", "push_ms": {"10": 1.0, "100": 1.1}, "exponent": e}
        for e in (0.01, -0.02)
    ]
    figure = figures.scaling({"scaling": rows, "exponents": fits, "flat": flat})
    found = texts(figure)
    assert {"0.97", "0.31"} <= set(found)
    assert any("volumes seen^-0.02" in text and "voxels^0.97" in text for text in found)


def test_footer_says_machine_date_and_revision():
    new = copy.deepcopy(report())
    assert figures.footer(new) == "Xeon, 2 threads; 2026-01-01; rtfmri 0.1.0 (abc)"
    new["machine"]["gpu"], new["device"] = {"name": "H100"}, "cuda"
    assert figures.footer(new).startswith("H100, Xeon, 2 threads; ")
