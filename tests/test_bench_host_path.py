"""The benchmark of the host's part of a step: reading callgrind's files, the baseline, a run."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_host_path

# As callgrind writes it: names in full once, relative positions, costs of callees, jumps.
DUMP = """# callgrind format
version: 1
creator: callgrind-3.19.0
part: 2

desc: I1 cache:
desc: Trigger: Client Request: ["300 x 16", "lrs_ext", "same", 3]

positions: line
events: Ir
summary: 2075

ob=(76) /env/lrs_ext/_C.cpython-311-x86_64-linux-gnu.so
fl=(98) ???
fn=(1482) 0x0000000000033460
0 400
cob=(11) /usr/lib/libpython3.11.so.1.0
cfi=(5) Python/ceval.c
cfn=(878) PyEval_SaveThread
calls=4 504
0 580
+3 20

ob=(11)
fl=(5)
fn=(878)
504 500
* 30
cob=(3) /usr/lib/libc.so.6
cfn=(7) malloc
calls=1 0
* 100
-2 50

ob=(2) /env/torch/lib/libtorch_cpu.so
fl=(98)
fn=(12) aoti_torch_get_data_ptr
0 900
fi=(13) inline.h
0 75

ob=(3)
fn=(7)
0 100

totals: 2075
"""


def test_counts_are_of_the_instructions_that_a_library_runs_itself():
    label, counts = bench_host_path.parse_counts(DUMP)
    assert json.loads(label) == ["300 x 16", "lrs_ext", "same", 3]
    assert list(counts.values()) == [420, 580, 975, 100]
    assert sum(counts.values()) == 2075  # as callgrind's total
    owners = {"total": 2075, "lrs_ext": 420, "torch": 975, "interpreter": 580, "other": 100}
    assert bench_host_path.by_owner(counts) == owners


@pytest.mark.parametrize(
    ("library", "owner"),
    [
        ("/env/lrs_ext/_C.cpython-311-x86_64-linux-gnu.so", "lrs_ext"),
        ("/env/site-packages/torch/lib/libc10.so", "torch"),
        ("/env/site-packages/torch/_C.cpython-311-x86_64-linux-gnu.so", "torch"),
        ("/usr/bin/python3.11", "interpreter"),
        ("/env/lib/libpython3.11.so.1.0", "interpreter"),
        ("/env/lib/python3.11/lib-dynload/_ctypes.cpython-311-x86_64-linux-gnu.so", "interpreter"),
        ("/lib/x86_64-linux-gnu/libc.so.6", "other"),
        ("???", "other"),
    ],
)
def test_every_library_has_an_owner(library, owner):
    counts = bench_host_path.by_owner({library: 5})
    assert {name for name, count in counts.items() if count} == {"total", owner}


def owners(total, ours):
    return {"total": total, "lrs_ext": ours, "torch": total - ours, "interpreter": 0, "other": 0}


def test_a_step_costs_the_difference_less_that_of_calling_nothing():
    def dumps(name, *counts):
        keys = (1, 4, 8)
        return {("c", name, "same", n): owners(*c) for n, c in zip(keys, counts, strict=True)}

    found = bench_host_path.per_step(
        dumps("nothing", (90, 0), (100, 0), (140, 0))
        | dumps("lrs_ext", (9000, 800), (4100, 450), (8140, 850))
    )
    expected = {"case": "c", "name": "lrs_ext", "gradients": "same", **owners(1000, 100)}
    assert found == [expected]


def row(name, total, ours, case="300 x 16"):
    return {"case": case, "name": name, "gradients": "same", **owners(total, ours)}


def test_only_our_own_rows_are_held_to_the_baseline():
    baseline = [row("lrs_ext", 1000, 100), row("torch fused", 1000, 0)]
    rows = [row("lrs_ext", 1029, 104), row("torch fused", 9000, 0), row("lrs_ext", 9, 9, "new")]
    checks = list(bench_host_path.risen(rows, baseline))
    assert [(c["what"], c["passed"]) for c in checks] == [("total", True), ("lrs_ext", False)]
    assert "| 300 x 16, same gradients | lrs_ext |" in bench_host_path.checks_table(checks)


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the benchmark on given rows; returns its exit code."""
    baseline = tmp_path / "baseline.json"

    def run(rows, *options):
        monkeypatch.setattr(bench_host_path, "count_instructions", lambda folder, quick: rows)
        return bench_host_path.main([*options, "--baseline", str(baseline)])

    return run


def test_the_baseline_is_kept_by_versions(measured, monkeypatch, tmp_path, capsys):
    rows = [row("torch fused", 9000, 0), row("lrs_ext", 1000, 100)]
    assert measured(rows, "--check") == 2
    assert "add them with --update" in capsys.readouterr().err
    assert measured(rows, "--update") == 0
    assert measured(rows, "--check", "--quick", "--json", str(tmp_path / "out.json")) == 0
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == rows
    worse = [row("lrs_ext", 1031, 100)]
    assert measured(worse) == 0
    assert measured(worse, "--check") == 1
    printed = capsys.readouterr().out
    assert "+3.1%" in printed
    assert "FAIL" in printed
    versions = bench_host_path.versions()
    monkeypatch.setattr(bench_host_path, "versions", lambda: "Python 4")
    assert measured(worse, "--check") == 2
    assert f"no numbers for Python 4, only for ['{versions}']" in capsys.readouterr().err
    assert measured(worse, "--update") == 0
    assert list(json.loads((tmp_path / "baseline.json").read_text())) == [versions, "Python 4"]


def test_the_stored_baseline_has_every_case():
    baselines = json.loads(bench_host_path.BASELINE.read_text())
    names = [case.name for case in bench_host_path.CASES]
    assert {case.name for case in bench_host_path.QUICK_CASES} <= set(names)
    for rows in baselines.values():
        ours = [(r["case"], r["gradients"]) for r in rows if r["name"] == bench_host_path.OURS]
        assert ours == [(name, kind) for name in names for kind in bench_host_path.GRADIENTS]


def test_help_has_the_limit_of_check(capsys):
    with pytest.raises(SystemExit):
        bench_host_path.main(["--help"])
    assert "more than 3% above" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--check --update", "give one of them"),
        ("--quick --update", "leave --quick out"),
        ("--json nowhere/x.json", "there is no folder nowhere"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_host_path.main(options.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ([], "no valgrind on the PATH: install valgrind"),
        (["valgrind"], "install one or set CC"),
        (["valgrind", "false"], "valgrind's headers could not be used"),
    ],
)
def test_what_is_missing_is_named(present, message, monkeypatch, capsys):
    monkeypatch.setenv("CC", "false")
    monkeypatch.setattr(bench_host_path.shutil, "which", lambda name: name in present or None)
    assert bench_host_path.main(["--quick"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.valgrind
def test_a_quick_run(request, tmp_path):
    if "valgrind" not in request.config.option.markexpr:
        pytest.skip("takes a minute: run it with -m valgrind")
    if bench_host_path.shutil.which("valgrind") is None:
        pytest.skip("no valgrind on the PATH: install valgrind")
    numbers = tmp_path / "numbers.json"
    assert bench_host_path.main(["--quick", "--json", str(numbers)]) == 0
    document = json.loads(numbers.read_text())
    totals = {(r["name"], r["gradients"]): r["total"] for r in document["rows"]}
    for kind in bench_host_path.GRADIENTS:
        assert 0 < 10 * totals["lrs_ext", kind] < totals["torch fused", kind]
    for counts in document["rows"]:
        assert counts["total"] == pytest.approx(
            sum(counts[k] for k in bench_host_path.OWNERS), abs=4
        )
        assert (counts["lrs_ext"] > 0) == (counts["name"] == "lrs_ext")
