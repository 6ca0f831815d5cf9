"""The benchmark of storage types: bytes, resumed runs, the page; runs of a few updates."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_storage
import job_runner
import storage_page
import storages
from bench_storage import CONTROL, Job

import lrs_ext


@pytest.fixture
def tiny(monkeypatch):
    """A GPT of one block, and few windows to validate on."""
    original = bench_storage.new_config
    sizes = {"layers": 1, "width": 32, "context": 32}
    monkeypatch.setattr(bench_storage, "new_config", lambda given: original(given | sizes))
    monkeypatch.setattr(bench_storage, "VALIDATION_BATCHES", 1)


NUMBERS = {
    "validation_loss": 3.0,
    "training_loss": 3.0,
    "bytes_held": 12.0,
    "bytes_moved": 28.0,
    "processor_seconds": 1.0,
}


def row(kind, seed, loss, **options):
    names = {"kind": kind, "steps": 5, "seed": seed}
    return names | NUMBERS | {"validation_loss": loss} | options


ROWS = [
    row("float32", 0, 1.0),
    row("float32", 1, 1.2),
    row(CONTROL, 0, 1.01),
    row(CONTROL, 1, 1.19),
    row("bf16 nearest", 0, 1.1),
    row("bf16 nearest", 1, 1.4),
    row("bf16 split", 0, 1.005),
    row("bf16 split", 1, 1.199),
    {"kind": "bf16 stochastic", "steps": 5, "seed": 0, "error": "ValueError: no"},
]


@pytest.mark.parametrize("kind", storages.KINDS.values(), ids=storages.KINDS)
@pytest.mark.parametrize(("name", "states"), [("SGD", 1), ("AdamW", 2), ("Lion", 1)])
def test_bytes_are_those_of_the_tensors(kind, name, states):
    params = [torch.ones(256, 3, dtype=kind.param_dtype, requires_grad=True)]
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(lrs_ext, name)(params, lr=0.1, **options, **kind.options)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    held, moved = storages.measured_bytes(optimizer)
    assert held == kind.bytes_held(states)
    assert moved == kind.bytes_moved(states)


def test_bytes_of_adamw():
    table = {name: (k.bytes_held(), k.bytes_moved()) for name, k in storages.KINDS.items()}
    assert table == {
        "float32": (12, 28),
        "float32, bf16 states": (8, 20),
        "float32, 8-bit states": (6.0625, 16.125),
        "fp16 nearest": (10, 22),
        "bf16 nearest": (10, 22),
        "bf16 stochastic": (10, 22),
        "bf16 stochastic, bf16 states": (6, 14),
        "bf16 stochastic, 8-bit states": (4.0625, 10.125),
        "bf16 split": (12, 26),
        "bf16 split, bf16 states": (8, 18),
        "bf16 split, 8-bit states": (6.0625, 14.125),
    }


@pytest.mark.parametrize("kind", storages.KINDS.values(), ids=storages.KINDS)
def test_keywords_are_python(kind):
    words = "" if kind.keywords == "none" else kind.keywords
    assert eval(f"dict({words})", {"torch": torch}).items() <= kind.options.items()


def test_a_kind_changes_nothing_but_the_storage(tiny):
    job = Job("float32", 4, 0)
    first, again = bench_storage.run_job(job), bench_storage.run_job(job)
    other = bench_storage.run_job(Job("bf16 split, 8-bit states", 4, 0))
    control = bench_storage.run_job(Job(CONTROL, 4, 0))
    assert first["validation_loss"] == again["validation_loss"]
    for found in (other, control):
        assert found["validation_loss"] != first["validation_loss"]
        assert found["validation_loss"] == pytest.approx(first["validation_loss"], abs=0.02)
    assert [first["bytes_moved"], control["bytes_held"]] == [28.0, 12.0]
    assert other["bytes_moved"] == pytest.approx(14.125, abs=0.01)


def test_quick_run_resumes_and_reports(tiny, tmp_path, capsys, monkeypatch):
    results = tmp_path / "storage.jsonl"
    options = ["--quick", "--steps", "2", "--workers", "1", "--results", str(results)]
    kinds = ["float32", "bf16 stochastic"]
    assert bench_storage.main([*options, "--kinds", *kinds]) == 0
    results.write_text(results.read_text() + '{"kind": "bf16 spl')  # killed while writing
    ran = []

    def run_job(job):
        ran.append(job.kind)
        return row(job.kind, job.seed, 3.0, steps=job.steps)

    monkeypatch.setattr(bench_storage, "run_job", run_job)
    assert bench_storage.main(options) == 0
    assert ran == [kind for kind in (CONTROL, *storages.KINDS) if kind not in kinds]
    assert len(list(job_runner.read_lines([results]))) == len(storages.KINDS) + 1
    assert "22 runs" not in capsys.readouterr().err
    assert bench_storage.main([*options, "--report", "--folder", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "storage.json").read_text())
    assert [entry["kind"] for entry in document["summary"]] == [CONTROL, *storages.KINDS]
    assert "| bf16 split, 8-bit states " in (tmp_path / "storage.md").read_text()
    assert (tmp_path / "storage.png").stat().st_size > 1000


def test_failed_runs_are_shown_and_run_again(tiny, tmp_path, capsys, monkeypatch):
    results = tmp_path / "storage.jsonl"
    options = ["--quick", "--steps", "2", "--workers", "1", "--results", str(results)]
    options += ["--kinds", "float32"]

    def fail(job):
        raise ValueError("no room")

    monkeypatch.setattr(bench_storage, "train", fail)
    assert bench_storage.main(options) == 1
    assert "float32, seed 0: ValueError: no room" in capsys.readouterr().out
    monkeypatch.setattr(bench_storage, "train", lambda job: NUMBERS)
    assert bench_storage.main(options) == 0


def test_runs_share_processes(tmp_path):
    results = tmp_path / "numbers.jsonl"
    jobs = [Job("float32", n, n) for n in range(3)]
    job_runner.run_jobs(storage_row, jobs, lambda job: job.steps, results, workers=2)
    found = sorted(row["seed"] for row in job_runner.read_lines([results]))
    assert found == [0, 1, 2]


def storage_row(job):
    return {"kind": job.kind, "steps": job.steps, "seed": job.seed}


def test_numbers_of_the_page():
    numbers = {entry["kind"]: entry for entry in storage_page.summary(ROWS)}
    nearest = numbers["bf16 nearest"]
    assert nearest["loss"] == 1.25
    assert nearest["difference"] == 0.15  # of +0.1 and +0.2
    assert nearest["standard_error"] == 0.05
    assert nearest["worst"] == 0.2
    assert numbers["float32"]["spread"] == pytest.approx(0.141421)
    assert "bf16 stochastic" not in numbers
    # Differences (+0.01, -0.01), (+0.1, +0.2) and (+0.005, -0.001) scatter by 0.0417 together.
    assert storage_page.resolution(ROWS) == pytest.approx(3.2 * 0.0417053 / 2**0.5, rel=1e-5)
    lines = storage_page.verdicts(ROWS)
    assert lines[0].startswith("A mean difference below 0.0944 cannot be told from chance; float32")
    assert "bf16 nearest: +0.1500 (+13.64%), worse" in lines
    assert "bf16 split: +0.0020 (+0.18%), not told from float32" in lines
    assert storage_page.resolution(ROWS[:1] + ROWS[2:3]) is None


def test_page_and_plot():
    config = bench_storage.configuration(Job("float32", 5, 0)).to_dict()
    page = storage_page.render(ROWS, config, {"device": "Fancy 3", "torch": "9.9"})
    for text in ("9 runs on Fancy 3, torch 9.9", "mean over 2 seeds", "for 5 updates", "## Failed"):
        assert text in page
    axes = storage_page.plot(ROWS).axes[0]
    labels = [line.get_label() for line in axes.lines]
    assert {"float32", "bf16 nearest", "bf16 split"} <= set(labels)
    assert storage_page.verdicts([])[0].startswith("Nothing was compared")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--workers 0", "--workers must be at least 1"),
        ("--kinds float33", "no storage 'float33'"),
    ],
)
def test_bad_options_are_refused(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_storage.main(options.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_report_without_results_says_what_to_do(tmp_path, capsys):
    assert bench_storage.main(["--report", "--results", str(tmp_path / "none.jsonl")]) == 1
    assert "run this without --report" in capsys.readouterr().err


def test_the_readme_says_what_was_measured():
    root = Path(__file__).parents[1]
    numbers = json.loads((root / "benchmarks" / "results" / "storage.json").read_text())["summary"]
    measured = {entry["kind"]: entry for entry in numbers}
    section = (root / "README.md").read_text().partition("### Storage types")[2]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    kinds = storages.KINDS.values()
    for cells, kind in zip(rows[: len(kinds)], kinds, strict=True):
        dtype, _, held, moved, difference, _ = (cell.strip() for cell in cells)
        assert getattr(torch, dtype) == kind.param_dtype
        assert float(held) == pytest.approx(kind.bytes_held(), abs=0.01)
        assert float(moved) == pytest.approx(kind.bytes_moved(), abs=0.05)
        assert difference == f"{measured[kind.name]['difference']:+.3f}".replace("+0.000", "0")
