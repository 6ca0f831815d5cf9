"""The benchmarks: measuring, the step benchmark on tiny sizes, the pages."""

import itertools
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from lrs_ext import timing

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_step
import machines
import results_page
import step_cases
import step_contenders
import step_plot
from storages import KINDS

CPU = torch.device("cpu")


def spread(seconds):
    return {"lower": 0.9 * seconds, "median": seconds, "upper": 1.1 * seconds}


def row(name, step, host, launches, **options):
    return {
        "name": name,
        "is_ours": name.startswith("lrs_ext"),
        "kind": "float32" if name.startswith("lrs_ext") else None,
        "param_dtype": "float32",
        "bytes_per_parameter": 28,
        "bytes_held": 12,
        "tolerance": 1e-4,
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
    case = bench_step.blank_result(step_cases.QUICK_CASES[0])
    unfit = case | {"name": "1 x 256M", "skipped": "needs 30.0 GiB, 10.0 GiB are free"}
    check = {"case": case["name"], "what": "speed", "measured": "nan", "target": ">= 1.0x"}
    bench = {
        "copy_bytes_per_second": 1e12,
        "unavailable": {"rocket": "no fuel"},
        "missing_peers": {"flashoptim": "not installed"},
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


class Device:
    """A stream that runs what is enqueued in order, in seconds, and a host that enqueues it."""

    def __init__(self, monkeypatch):
        self.host = self.end = 0.0
        device, clock = self, 1e9  # cycles a second

        class Event:
            def record(self):
                device.enqueue(0.0)
                self.time = device.end

            def query(self):
                return self.time <= device.host

            def synchronize(self):
                device.host = max(device.host, self.time)

            def elapsed_time(self, end):
                return 1e3 * (end.time - self.time)

        monkeypatch.setattr(timing, "_event", Event)
        monkeypatch.setattr(timing, "_spin", lambda cycles: self.enqueue(cycles / clock))
        monkeypatch.setattr(timing, "synchronize", lambda device: self.wait())
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.host)

    def enqueue(self, seconds, host_seconds=0.0):
        self.host += host_seconds
        self.end = max(self.end, self.host) + seconds

    def wait(self):
        self.host = max(self.host, self.end)


def test_seconds_of_the_device_say_when_it_has_waited_for_the_host(monkeypatch):
    device = Device(monkeypatch)

    def waiting():
        device.enqueue(0.001, host_seconds=0.01)
        device.wait()
        device.enqueue(0.001, host_seconds=0.01)

    calls = {
        "short": lambda: device.enqueue(0.002, host_seconds=0.01),
        "waiting": waiting,
        "long": lambda: [device.enqueue(1e-5, host_seconds=0.001) for _ in range(5_000)],
    }
    host = timing.host_seconds(calls, 3, CPU)
    found = timing.device_seconds(calls, 3, CPU, host)
    assert [spread.has_waited for spread in found.values()] == [False, True, True]
    assert found["short"].median == pytest.approx(0.002)
    assert found["long"].median > 1.0


def test_copy_bandwidth_and_the_machine():
    assert 1e6 < timing.copy_bandwidth(CPU, 2**16, rounds=3) < 1e15
    facts = machines.machine(CPU)
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
    kinds = len(KINDS) - 1
    assert len(bench["cases"]) == len(step_cases.QUICK_CASES) == len(bench["checks"]) - kinds
    for case in bench["cases"]:
        assert not case["errors"]
        assert case["name"] in printed
        if not case["compares_storage"] and "optimi" not in printed:
            baseline = "torch" if case["algorithm"] in ("Lion", "LAMB") else "torch fused"
            assert case["rows"][0]["name"].endswith(baseline)
        for measured in case["rows"]:
            assert measured["step"]["median"] > 0
            assert measured["tolerance"] is None or measured["difference"] <= measured["tolerance"]
    name = results_page.cpu_page(bench["machine"])
    page = (tmp_path / f"{name}.md").read_text()
    assert results_page.bench_tables(bench) in page.replace(
        f"{results_page.PLOT_PLACE}\n\n![Share of the copy rate]({name}.png)",
        results_page.PLOT_PLACE,
    )
    assert results_page.bench_tables(bench) in printed
    assert (tmp_path / f"{name}.png").stat().st_size > 1000


def test_an_optimizer_that_does_nothing_fails_the_check(monkeypatch, capsys):
    monkeypatch.setattr(step_contenders, "start_ours", lambda *_: lambda params: lambda: None)
    options = ["--device", "cpu", "--quick", "--rounds", "1"]
    assert bench_step.main(options) == 0
    assert bench_step.main([*options, "--check"]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_one_that_skips_a_step_fails_the_check(monkeypatch):
    real = step_contenders.start_ours

    def start(*which):
        def start_late(params):
            step, numbers = real(*which)(params), itertools.count()
            return lambda: next(numbers) and step()

        return start_late

    monkeypatch.setattr(step_contenders, "start_ours", start)
    case = step_cases.Case("3 x 50", ((50,),) * 3, rounds=300)
    result = bench_step.blank_result(case)
    bench_step.run_case(case, CPU, result)
    assert [check["passed"] for check in bench_step.checks(case, result, CPU)] == [False]


def test_one_that_cannot_run_is_noted_and_fails_the_check(monkeypatch):
    def start(params):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(step_contenders, "start_ours", lambda *_: start)
    case = step_cases.QUICK_CASES[2]
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
    case = step_cases.Case("x", ((16,),), 1, min_ratio=3.0, max_host_seconds=50e-6)
    ours = row("lrs_ext cpu", step, host, None, ratio=10 / step, host_new_gradients=spread(host))
    checks = bench_step.checks(case, bench_step.blank_result(case) | {"rows": [ours]}, CPU)
    assert [check["passed"] for check in checks] == [True, passed, passed, passed]


@pytest.mark.parametrize(
    ("shapes", "tensors", "parameters"),
    [
        (step_cases.gpt2_shapes(), 148, 124_439_808),
        (step_cases.llama_shapes(1), 291, 8_030_261_248),
        (step_cases.resnet50_shapes(), 161, 25_557_032),
    ],
)
def test_shapes_are_those_of_the_models(shapes, tensors, parameters):
    assert (len(shapes), sum(map(math.prod, shapes))) == (tensors, parameters)


@pytest.mark.parametrize(
    ("options", "ours", "torchs"),
    [
        ({}, 28, 28),
        ({"dtype": torch.bfloat16}, 22, 14),
        ({"algorithm": "SGD"}, 20, 20),
        ({"algorithm": "Lion"}, 20, 20),
        ({"algorithm": "LAMB"}, 40, 40),
        ({"algorithm": "LAMB", "dtype": torch.bfloat16}, 32, 20),
        ({"max_norm": 1.0}, 32, 32),
    ],
)
def test_traffic(options, ours, torchs):
    case = step_cases.Case("x", ((16,),), 1, **options)
    found = step_contenders.contenders(case, CPU)
    assert not found[0].is_ours
    assert found[-1].is_ours
    assert [found[-1].bytes_moved, found[0].bytes_moved] == [ours, torchs]


def test_storage_cases_have_every_kind():
    case = step_cases.Case("x", ((16,),), 1, kinds=tuple(KINDS))
    found = step_contenders.contenders(case, CPU)
    assert [contender.kind for contender in found if contender.is_ours] == list(KINDS)
    assert [contender.bytes_moved for contender in found if not contender.is_ours] == [28, 14]
    for device in ("cpu", "cuda"):
        kinds = [case.kinds for case in step_cases.cases(device, quick=False) if case.kinds]
        assert kinds == [tuple(KINDS)]


def test_others_take_part_where_they_are_installed(monkeypatch):
    case = step_cases.Case("x", ((16,),), 1)
    monkeypatch.setattr(step_contenders.importlib.util, "find_spec", lambda name: None)
    assert "pip install torch-optimi" in step_contenders.missing_peers()["torch-optimi"]
    assert len(step_contenders.peers(case, CPU)) == 0
    monkeypatch.setattr(step_contenders.importlib.util, "find_spec", lambda name: name)
    assert step_contenders.missing_peers() == {}
    assert [peer.name for peer in step_contenders.peers(case, CPU)] == ["optimi"]
    storage = step_cases.Case("x", ((16,),), 1, kinds=tuple(KINDS))
    assert step_contenders.peers(storage, CPU) == []
    assert len(step_contenders.peers(storage, torch.device("cuda"))) == 1


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
    assert [path.name for path in paths] == ["fancy.json", "fancy.md", "fancy.png"]
    assert json.loads(paths[0].read_text()) == document
    page = paths[1].read_text()
    for text in (
        "# NVIDIA Fancy 3",
        "| torch  | 9.9 ",
        "`tests.test_a::test_bad` failed",
        "29.4",
        "lrs_ext rocket: not run, no fuel",
        "flashoptim: not run, not installed",
        "(fancy.png)",
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


def test_storage_types_are_held_against_the_speed_of_float32(document):
    bench = document["stages"]["step benchmark"]["bench"]
    small = {"kind": "bf16 split, bf16 states", "param_dtype": "bfloat16", "bytes_held": 7}
    rows = [
        row("torch fused", 2e-3, 1, 1),
        row("torch fused, all bf16", 0.8e-3, 1, 1, param_dtype="bfloat16"),
        row("lrs_ext cpu, float32", 1e-3, 1, 1),
        row("lrs_ext cpu, small", 1e-3, 1, 1, bytes_per_parameter=14, **small),
    ]
    bench["cases"][:] = [bench["cases"][0] | {"rows": rows, "compares_storage": True}]
    lines = results_page.not_ahead(bench).splitlines()
    assert lines == [
        "- 1 x 1M, lrs_ext cpu, small: step 1.000 ms, torch fused, all bf16 800.0 us",
        "- 1 x 1M, lrs_ext cpu, small: 50% of the speed allowed",
    ]
    table = results_page.storage_table(bench["cases"][0]).splitlines()
    assert table[-1].split("|")[-2].strip() == "50%"
    assert table[-2].split("|")[-2].strip() == "100%"
    assert results_page.storage_table(bench["cases"][0]) in results_page.bench_tables(bench)


def test_a_time_of_a_gpu_that_waited_says_so(document):
    bench = document["stages"]["step benchmark"]["bench"]
    sentence = "the GPU waited for the host within the step"
    assert sentence not in results_page.bench_tables(bench)
    measured = bench["cases"][0]["rows"][0]
    measured["step"] = {**spread(0.109), "has_waited": True}
    page = results_page.bench_tables(bench)
    assert sentence in page
    assert page.count("109.000 ms, host") == 1


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "numbers.json"
    results_page.write_whole(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results_page.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        results_page.write_whole(path, "new")
    assert path.read_text() == "old"


def test_plot_has_a_line_for_each_dtype(document):
    bench = document["stages"]["step benchmark"]["bench"]
    found = step_plot.lines(bench)
    assert found["lrs_ext cuda", "float32"] == [(2**20, 28 * 2**20 / 1e-3 / 1e12)]
    labels = [line.get_label() for line in step_plot.plot(bench).axes[0].lines]
    assert "lrs_ext cuda, float32 parameters" in labels
    bench["cases"][0]["in_plot"] = False
    assert not step_plot.can_plot(bench)


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
