"""The benchmarks: measuring, the step benchmark on tiny sizes, the pages and the GPU report."""

import itertools
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_step
import gpu_report
import results_page
import sanitizer_steps
import timing

CPU = torch.device("cpu")
JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good[cuda]" time="0.1" />
<testcase classname="tests.test_a" name="test_bad" time="0.1">
  <failure message="assert 1 == 2&#10;more">long text</failure></testcase>
<testcase classname="tests.test_a" name="test_broken" time="0.1"><error message="boom" /></testcase>
<testcase classname="tests.test_a" name="test_passed_over" time="0.0">
  <skipped type="pytest.skip" message="no CUDA device">where</skipped></testcase>
<testcase classname="tests.test_a" name="test_expected" time="0.0">
  <skipped type="pytest.xfail" message="known" /></testcase>
</testsuite></testsuites>"""


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors are faster with one thread, also when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def spread(seconds):
    return {"lower": 0.9 * seconds, "median": seconds, "upper": 1.1 * seconds}


def row(name, step, host, launches, **options):
    return {
        "name": name,
        "is_ours": name.startswith("lrs_ext"),
        "bytes_per_parameter": 28,
        "step": spread(step),
        "host": spread(host),
        "host_new_gradients": None,
        "ratio": 2e-3 / step,
        "difference": 1e-7,
        "launches": launches,
    } | options


@pytest.fixture
def document():
    """A report of made-up numbers: one backend ahead, one behind, failed stages."""
    rows = [
        row("torch fused", 2e-3, 90e-6, 9),
        row("torch foreach", 5e-3, 900e-6, 40),
        row("lrs_ext cuda", 1e-3, 30e-6, 1),
        row("lrs_ext triton", 2.5e-3, 60e-6, None, ratio=0.8),
    ]
    case = bench_step.blank_result(bench_step.QUICK_CASES[0])
    unfit = case | {"name": "1 x 256M", "skipped": "needs 30.0 GiB, 10.0 GiB are free"}
    check = {"case": case["name"], "what": "speed", "measured": "nan", "target": ">= 1.0x"}
    bench = {
        "copy_bytes_per_second": 1e12,
        "baseline": "torch fused",
        "unavailable": {"rocket": "no fuel"},
        "cases": [case | {"rows": rows, "errors": {"torch odd": "RuntimeError: no"}}, unfit],
        "checks": [check | {"passed": False}],
    }
    failures = ["`tests.test_a::test_bad` failed: assert a | b"]
    counts = {"passed": 3, "failed": 1}
    tests = {"passed": False, "seconds": 12.3, "detail": "1 failed", "counts": counts}
    return {
        "machine": {"device": "NVIDIA Fancy 3", "torch": "9.9"},
        "stages": {
            "GPU tests": tests | {"failures": failures, "output": "Segmentation fault"},
            "step benchmark": {"passed": True, "seconds": 1.0, "detail": "fine", "bench": bench},
            "memcheck": {"passed": True, "seconds": 2.0, "detail": "ERROR SUMMARY: 0 errors"},
        },
    }


# Measuring


def test_calls_take_turns_and_preparation_is_not_measured():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}

    def prepare(name):
        order.append(f"before {name}")
        time.sleep(0.05)

    spreads = timing.host_seconds(calls, 3, CPU, prepare)
    assert order == ["before a", "a", "before b", "b"] * 3
    assert set(spreads) == {"a", "b"}
    for measured in spreads.values():
        assert 0 <= measured.lower <= measured.median <= measured.upper
        assert measured.median < 0.05


def test_medians_and_quartiles(monkeypatch):
    clock = itertools.accumulate([0, 1, 0, 2, 0, 3, 0, 4, 0, 5])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert timing.host_seconds({"a": int}, 5, CPU)["a"] == timing.Spread(2, 3, 4)
    with pytest.raises(ValueError, match="rounds must be positive, got 0"):
        timing.host_seconds({"a": int}, 0, CPU)


def test_copy_bandwidth_and_the_machine():
    assert 1e6 < timing.copy_bandwidth(CPU, 2**16, rounds=3) < 1e15
    facts = timing.machine(CPU)
    assert next(iter(facts)) == "device"
    assert facts["torch"] == torch.__version__
    assert all(isinstance(value, str) for value in facts.values())


# The step benchmark


def test_bench_step_end_to_end(tmp_path, capsys):
    numbers = tmp_path / "step.json"
    options = ["--device", "cpu", "--quick", "--rounds", "2", "--check"]
    assert bench_step.main([*options, "--json", str(numbers), "--report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    bench = json.loads(numbers.read_text())
    assert len(bench["cases"]) == len(bench["checks"]) == len(bench_step.QUICK_CASES)
    for case in bench["cases"]:
        assert [row["name"] for row in case["rows"]] == ["torch fused", "lrs_ext cpu"]
        assert not case["errors"]
        assert case["name"] in printed
        for measured in case["rows"]:
            assert measured["step"]["median"] > 0
            assert measured["difference"] < 1e-4
    page = (tmp_path / f"cpu-{results_page.slug(bench['machine']['device'])}.md").read_text()
    assert results_page.bench_tables(bench) in page
    assert results_page.bench_tables(bench) in printed


def test_an_optimizer_that_does_nothing_fails_the_check(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "start_ours", lambda backend: lambda params: lambda: None)
    options = ["--device", "cpu", "--quick", "--rounds", "1"]
    assert bench_step.main(options) == 0
    assert bench_step.main([*options, "--check"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_one_that_skips_a_step_fails_the_check(monkeypatch):
    real = bench_step.start_ours

    def start(backend):
        def start_late(params):
            step, numbers = real(backend)(params), itertools.count()
            return lambda: next(numbers) and step()

        return start_late

    monkeypatch.setattr(bench_step, "start_ours", start)
    case = bench_step.Case("3 x 50", ((50,),) * 3, rounds=300)
    result = bench_step.blank_result(case)
    bench_step.run_case(case, CPU, result)
    assert [check["passed"] for check in bench_step.checks(case, result, CPU)] == [False]


def test_one_that_cannot_run_is_noted_and_fails_the_check(monkeypatch):
    def start(params):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(bench_step, "start_ours", lambda backend: start)
    case = bench_step.QUICK_CASES[2]
    result = bench_step.blank_result(case)
    bench_step.run_case(case, CPU, result)
    assert result["errors"] == {"lrs_ext cpu": "RuntimeError: no kernel"}
    assert [row["name"] for row in result["rows"]] == ["torch fused"]
    assert [check["passed"] for check in bench_step.checks(case, result, CPU)] == [False]


def test_gradients_are_new_tensors_at_new_addresses():
    params = [torch.zeros(1000, requires_grad=True) for _ in range(3)]
    gradients = [torch.randn(1000) for _ in params]
    seen = []
    for _ in range(2):
        bench_step.give_gradients(params, gradients)
        seen.append([param.grad for param in params])
        assert all(map(torch.equal, seen[-1], gradients))
    for old, new in zip(*seen, strict=True):
        assert old is not new
        assert old.data_ptr() != new.data_ptr()


@pytest.mark.parametrize(
    ("step", "host", "passed"), [(1.0, 40e-6, True), (11.0, 60e-6, False), (math.nan, 1, False)]
)
def test_targets(step, host, passed):
    case = bench_step.Case("x", ((16,),), 1, min_ratio=3.0, max_host_seconds=50e-6)
    ours = row("lrs_ext cpu", step, host, None, ratio=10 / step, host_new_gradients=spread(host))
    checks = bench_step.checks(case, bench_step.blank_result(case) | {"rows": [ours]}, CPU)
    assert [check["passed"] for check in checks] == [True, passed, passed, passed]


def test_cases_and_their_traffic():
    shapes = bench_step.gpt2_shapes()
    assert (len(shapes), sum(map(math.prod, shapes))) == (148, 124_439_808)
    ours = bench_step.Contender("lrs_ext cuda", int, is_ours=True)
    torchs = bench_step.Contender("torch fused", int, is_ours=False)
    found = [c.bytes_per_parameter(d) for c in (ours, torchs) for d in bench_step.TOLERANCE]
    assert found == [28, 22, 28, 14]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--device tpu", "--device must be cpu, cuda or cuda:N, got tpu"),
        ("--device cuda:99", "use --device cpu"),
        ("--rounds 0", "--rounds must be positive, got 0"),
        ("--json nowhere/x.json", "there is no folder nowhere"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_step.main(options.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


# The page


def test_page(document, tmp_path):
    paths = results_page.write(document, tmp_path / "new", "fancy")
    assert [path.name for path in paths] == ["fancy.json", "fancy.md"]
    assert json.loads(paths[0].read_text()) == document
    page = paths[1].read_text()
    for text in (
        "# NVIDIA Fancy 3",
        "| torch  | 9.9 ",
        "`tests.test_a::test_bad` failed",
        "29.4",
        "lrs_ext rocket: not run, no fuel",
        "1 x 256M: not run, needs 30.0 GiB, 10.0 GiB are free",
        "1 x 1M, torch odd: RuntimeError: no",
        "Segmentation fault",
    ):
        assert text in page


def test_where_we_are_not_ahead(document):
    bench = document["stages"]["step benchmark"]["bench"]
    text = results_page.not_ahead(bench)
    assert text == "- 1 x 1M, lrs_ext triton: step 2.500 ms, torch fused 2.000 ms"
    rows = bench["cases"][0]["rows"]
    rows.pop()
    assert results_page.not_ahead(bench) == "Ahead or level in all 3 comparisons."
    rows.clear()
    assert results_page.not_ahead(bench) == "Nothing was compared."


def test_tables_and_file_names_hold_any_text():
    text = results_page.table(("what", "n"), [("a|b\nc", "1"), ("d", "-"), ("e", "22")])
    assert text.splitlines() == [
        r"| what   |   n |",
        r"| ------ | --: |",
        r"| a\|b c |   1 |",
        r"| d      |   - |",
        r"| e      |  22 |",
    ]
    assert results_page.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert results_page.slug("Intel(R) Xeon(R) @ 2.2GHz") == "intel-r-xeon-r-2-2ghz"


# The GPU report


def test_junit_counts():
    failures = [
        "`tests.test_a::test_bad` failed: assert 1 == 2",
        "`tests.test_a::test_broken` error: boom",
    ]
    counts = {"passed": 1, "failed": 1, "error": 1, "skipped": 1, "xfailed": 1}
    assert gpu_report.read_junit(JUNIT, skips_fail=False) == (counts, failures)
    failures.append("`tests.test_a::test_passed_over` skipped: no CUDA device")
    assert gpu_report.read_junit(JUNIT, skips_fail=True) == (counts, failures)


@pytest.mark.parametrize(("kind", "fails"), [("skip", True), ("xfail", False)])
def test_a_skipped_gpu_test_fails_the_stage(kind, fails, monkeypatch, tmp_path):
    def run_command(command, limit):
        (xml,) = [part.partition("=")[2] for part in command if part.startswith("--junitxml=")]
        odd = f'<testcase name="b"><skipped type="pytest.{kind}" message="m" /></testcase>'
        Path(xml).write_text(f'<testsuites><testcase name="a" />{odd}</testsuites>')
        return 0, "1 passed"

    monkeypatch.setattr(gpu_report, "run_command", run_command)
    outcome = gpu_report.run_tests(10, gpu=True, folder=tmp_path)
    assert outcome["passed"] is not fails
    assert gpu_report.run_tests(10, gpu=False, folder=tmp_path)["passed"]


def test_commands_end_in_time():
    started = time.monotonic()
    waits = "import time; time.sleep(60)"
    code, output = gpu_report.run_command([sys.executable, "-c", waits], 1.0)
    assert time.monotonic() - started < 20
    assert gpu_report.ending(code, output, 1.0) == "did not finish within 1 s"


def test_commands_give_their_exit_code_and_output():
    script = "import os, sys; print(os.environ['LRS_TEST']); sys.exit('bad')"
    code, output = gpu_report.run_command([sys.executable, "-c", script], 60, {"LRS_TEST": "x"})
    assert sorted(output.splitlines()) == ["bad", "x"]
    assert gpu_report.ending(code, "x\nbad\n\n", 60) == "exit code 1: bad"
    assert gpu_report.ending(0, "x", 60) == "exit code 0"


def test_a_failed_stage_is_recorded_and_stops_no_other(capsys):
    def crash(limit):
        raise RuntimeError(f"lost {gpu_report.ROOT}/x\nmore")

    def good(limit):
        assert limit == 50
        return {"passed": True, "detail": "fine"}

    document, saved = {"stages": {}}, []
    gpu_report.run_stages(
        {"first": (crash, 50), "second": (good, 50), "third": (good, 1)},
        document,
        lambda: saved.append(list(document["stages"])),
        time.monotonic() + 100,
    )
    assert saved == [["first"], ["first", "second"], ["first", "second", "third"]]
    stages = document["stages"]
    assert [stage["passed"] for stage in stages.values()] == [False, True, False]
    assert stages["first"]["detail"] == "RuntimeError: lost ./x"
    assert stages["third"]["detail"] == "no time was left: give more --minutes"
    assert all(stage["seconds"] >= 0 for stage in stages.values())


def test_a_killed_benchmark_keeps_its_numbers(document, monkeypatch, tmp_path):
    bench = document["stages"]["step benchmark"]["bench"]
    (tmp_path / "bench_step.json").write_text(json.dumps(bench))
    monkeypatch.setattr(gpu_report, "run_command", lambda command, limit: (None, "1 x 1M ..."))
    outcome = gpu_report.run_benchmark(7, folder=tmp_path)
    assert outcome["bench"] == bench
    assert not outcome["passed"]
    assert outcome["detail"] == "0 of 1 checks passed; did not finish within 7 s"


@pytest.mark.parametrize(
    ("code", "output", "passed"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True),
        (0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        (0, "========= ERROR SUMMARY: 10 errors", False),
        (9, "========= ERROR SUMMARY: 0 errors", False),
        (0, "Target application terminated before the first instrumented call", False),
    ],
)
def test_sanitizer_summaries(code, output, passed, monkeypatch):
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(gpu_report, "run_command", lambda *_: (code, output))
    assert gpu_report.run_sanitizer(10, tool="memcheck")["passed"] is passed


def test_a_missing_sanitizer_is_named(monkeypatch):
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name, path=None: None)
    outcome = gpu_report.run_sanitizer(10, tool="memcheck")
    assert not outcome["passed"]
    assert "comes with the CUDA toolkit" in outcome["detail"]


@pytest.mark.parametrize(
    ("has_gpu", "message"),
    [
        (False, "sees no CUDA device: run this on a machine with an NVIDIA GPU"),
        (True, "the cuda backend of lrs_ext cannot be used: reinstall with LRS_CUDA=1"),
    ],
)
def test_an_unfit_machine_is_told_the_way_out(has_gpu, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("lrs_ext.ops.unavailable_reason", lambda *_: "reinstall with LRS_CUDA=1")
    assert gpu_report.main(["--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sanitizer_steps_cover_every_optimizer(capsys):
    assert sanitizer_steps.main(["--backend", "cpu"]) == 0
    names = sanitizer_steps.optimizers()
    assert {"SGD", "Adam", "AdamW", "Lion", "LAMB"} <= set(names)
    assert capsys.readouterr().out.splitlines() == [f"{name}: done" for name in names]
