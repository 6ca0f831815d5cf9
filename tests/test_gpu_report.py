"""The GPU report: stages, what it reads from their output, and the parts that need no GPU."""

import json
import math
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu_features
import gpu_report
import sanitizer_steps

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good[cuda]" time="0.1" />
<testcase classname="tests.test_a" name="test_bad" time="0.1">
  <failure message="assert 1 == 2&#10;more">long text</failure></testcase>
<testcase classname="tests.test_a" name="test_broken" time="0.1"><error message="boom" /></testcase>
<testcase classname="tests.test_a" name="test_passed_over" time="0.0">
  <skipped type="pytest.skip" message="no CUDA device">where</skipped></testcase>
<testcase classname="tests.test_a" name="test_table[reference-cuda]" time="0.0">
  <skipped type="pytest.skip" message="it has no table">where</skipped></testcase>
<testcase classname="" name="tests.test_framework" time="0.0">
  <skipped type="pytest.skip" message="collection skipped">it is not installed</skipped></testcase>
<testcase classname="tests.test_a" name="test_expected" time="0.0">
  <skipped type="pytest.xfail" message="known" /></testcase>
</testsuite></testsuites>"""


def test_junit_counts():
    failures = [
        "`tests.test_a::test_bad` failed: assert 1 == 2",
        "`tests.test_a::test_broken` error: boom",
        "`tests.test_a::test_passed_over` skipped: no CUDA device",
    ]
    counts = {"passed": 1, "failed": 1, "error": 1, "skipped": 3, "xfailed": 1}
    assert gpu_report.read_junit(JUNIT) == (counts, failures)


@pytest.mark.parametrize(("kind", "fails"), [("pytest.skip", True), ("pytest.xfail", False)])
def test_a_skipped_gpu_test_fails_the_stage(kind, fails, monkeypatch, tmp_path):
    def run_command(command, limit, environment):
        (xml,) = [part.partition("=")[2] for part in command if part.startswith("--junitxml=")]
        odd = f'<testcase name="b"><skipped type="{kind}" message="m" /></testcase>'
        Path(xml).write_text(f'<testsuites><testcase name="a" />{odd}</testsuites>')
        return 0, "1 passed"

    monkeypatch.setattr(gpu_report, "run_command", run_command)
    assert gpu_report.run_tests(10, folder=tmp_path)["passed"] is not fails


def test_a_file_that_cannot_be_imported_does_not_stop_the_others(monkeypatch, tmp_path):
    (tmp_path / "test_good.py").write_text("import pytest\n@pytest.mark.gpu\ndef test(): pass\n")
    (tmp_path / "test_bad.py").write_text("import a_package_that_is_not_here\n")
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)  # xdist runs them in any case
    outcome = gpu_report.run_tests(60, folder=tmp_path)
    assert not outcome["passed"]
    assert (outcome["counts"]["passed"], len(outcome["failures"])) == (1, 1)
    assert "test_bad" in outcome["failures"][0]


def test_kernels_that_fail_keep_the_cases_before(monkeypatch, tmp_path):
    def run_command(command, limit):
        Path(command[-1]).write_text("[{}, {}]")
        return 1, "a table\nkernels ended with 3: no memory"

    monkeypatch.setattr(gpu_report, "run_command", run_command)
    outcome = gpu_report.run_kernels(10, folder=tmp_path)
    assert not outcome["passed"]
    assert outcome["kernels"] == [{}, {}]
    assert outcome["detail"] == "2 cases; exit code 1: kernels ended with 3: no memory"


def test_commands_end_in_time():
    started = time.monotonic()
    waits = "import time; time.sleep(60)"
    code, output = gpu_report.run_command([sys.executable, "-c", waits], 1.0)
    assert time.monotonic() - started < 20
    assert gpu_report.ending(code, output, 1.0) == "did not finish within 1 s"


GRANDCHILD = """
import subprocess, sys
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True)"
child += "; time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
process.stdout.readline()
print(process.pid, flush=True)
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_ended(pid):
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to look at")
@pytest.mark.parametrize("waits", ["", "process.wait()"])
def test_nothing_that_a_command_started_outlives_it(waits):
    """It would disturb the benchmarks that follow."""
    command = [sys.executable, "-c", GRANDCHILD + waits]
    code, output = gpu_report.run_command(command, 5.0 if waits else 60.0)
    assert code == (None if waits else 0)
    wait_until_ended(int(output.split()[0]))


def test_a_stopped_report_ends_its_commands_and_writes_what_there_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_report, "unusable_reason", lambda: None)
    monkeypatch.setattr(gpu_report.machines, "machine", lambda device: {"device": "GPU 1"})
    sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]

    def sleep(limit):
        gpu_report.run_command(sleeps, limit)
        return {"passed": False, "detail": "ended"}

    def stop(limit):
        while not gpu_report.RUNNING:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
        return {"passed": True, "detail": "fine"}

    planned = {name: gpu_report.Stage(run, 300) for name, run in {"a": sleep, "b": stop}.items()}
    planned["timed"] = gpu_report.Stage(stop, 300, is_timed=True)
    monkeypatch.setattr(gpu_report, "stages", lambda folder: planned)
    handler, started = signal.getsignal(signal.SIGTERM), time.monotonic()
    assert gpu_report.main(["--out", str(tmp_path)]) == 130
    assert time.monotonic() - started < 60
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not gpu_report.RUNNING
    stages = json.loads((tmp_path / "gpu-1.json").read_text())["stages"]
    assert {name: stage["passed"] for name, stage in stages.items()} == {"a": False, "b": True}
    assert "| b " in (tmp_path / "gpu-1.md").read_text()
    assert "stopped: other stages have not run" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf"])
def test_minutes_that_make_no_sense_are_refused(minutes, capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu_report.main(["--minutes", minutes, "--out", str(tmp_path)])
    assert "--minutes must be positive and finite" in capsys.readouterr().err


def test_a_stage_and_its_end_by_force_fit_into_what_is_left():
    limits = []

    def run(limit):
        limits.append(limit)
        return {"passed": True, "detail": ""}

    gpu_report.outcome_of(gpu_report.Stage(run, 300), time.monotonic() + 100)
    assert limits[0] <= 100 - gpu_report.GRACE


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
        {
            "first": gpu_report.Stage(crash, 50, is_timed=True),
            "second": gpu_report.Stage(good, 50),
            "third": gpu_report.Stage(good, 1, is_timed=True),
        },
        document,
        lambda: saved.append(list(document["stages"])),
        time.monotonic() + 100,
    )
    assert saved == [["second"], ["first", "second"], ["first", "second", "third"]]
    stages = document["stages"]
    assert [stage["passed"] for stage in stages.values()] == [False, True, False]
    assert stages["first"]["detail"] == "RuntimeError: lost ./x"
    assert stages["third"]["detail"] == "no time was left: give more --minutes"
    assert all(stage["seconds"] >= 0 for stage in stages.values())


def test_what_measures_no_time_runs_side_by_side():
    both = threading.Barrier(2, timeout=30)

    def meet(limit):
        both.wait()
        return {"passed": True, "detail": ""}

    document = {}
    planned = {name: gpu_report.Stage(meet, 50) for name in ("first", "second")}
    gpu_report.run_stages(planned, document, lambda: None, time.monotonic() + 100)
    assert all(stage["passed"] for stage in document["stages"].values())


def test_a_killed_benchmark_keeps_its_numbers(monkeypatch, tmp_path):
    bench = {"checks": [{"passed": False}]}
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
    monkeypatch.setattr(
        "lrs_ext.backends.unavailable_reason", lambda *_: "reinstall with LRS_CUDA=1"
    )
    assert gpu_report.main(["--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sanitizer_steps_cover_every_optimizer(capsys):
    assert sanitizer_steps.main(["--backend", "cpu"]) == 0
    names = sanitizer_steps.optimizers()
    assert {"SGD", "Adam", "AdamW", "Lion", "LAMB"} <= set(names)
    stored = [f"{name} with every storage type" for name in sanitizer_steps.STORED]
    done = [*names, *stored, "large tensors with every storage type"]
    done.append("scaled, clipped and released gradients")
    assert capsys.readouterr().out.splitlines() == [f"{name}: done" for name in done]


def test_the_report_has_a_stage_for_each_feature(monkeypatch, tmp_path):
    planned = gpu_report.stages(tmp_path)
    features = {"storages", "lion", "lamb", "amp", "clipping", "gradient-release", "graph"}
    features |= {"plateau", "compiled-step"}
    assert features == set(gpu_features.CHECKS)
    assert features < set(planned)
    assert next(iter(planned)) == "GPU tests"
    together = [stage for stage in planned.values() if not stage.is_timed]
    assert {stage.longest for stage in together} == {gpu_report.LONGEST_TOGETHER}
    commands = []

    def run_command(command, limit):
        commands.append(command)
        return 0, "lion, cuda: distance 0.0e+00\nlion, triton: distance 1.0e-08\n"

    monkeypatch.setattr(gpu_report, "run_command", run_command)
    outcome = planned["lion"].run(7.0)
    assert outcome["passed"]
    assert outcome["detail"].count("distance") == 2
    assert commands[0][2:] == ["lion", "--device", "cuda"]
    assert not planned["lamb"].run(7.0)["passed"]  # its line is missing


@pytest.mark.parametrize("name", gpu_features.CHECKS)
def test_features_on_the_cpu(name, capsys):
    assert gpu_features.main([name, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(f"{name}, cpu: ")


def test_a_wrong_feature_fails_and_stops_no_other(monkeypatch, capsys):
    def wrong(device, backend):
        gpu_features.within("x", math.nan, 1.0)

    checks = {"wrong": wrong, "right": lambda device, backend: "fine"}
    monkeypatch.setattr(gpu_features, "CHECKS", checks)
    assert gpu_features.main(["--device", "cpu"]) == 1
    assert capsys.readouterr().out.splitlines() == ["wrong, cpu: FAILED", "right, cpu: fine"]
    with pytest.raises(SystemExit):
        gpu_features.main(["unknown", "--device", "cpu"])


def test_features_on_a_gpu_need_one(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_features.main([])
    assert "cuda is not here" in capsys.readouterr().err
