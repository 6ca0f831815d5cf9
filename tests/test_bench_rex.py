"""The reproduction of the REX paper's tables: stacks of models, plan, page; in small."""

import contextlib
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_rex
import job_runner
import rex_page
import rex_runs
import rex_settings
import rex_speed
from rex_runs import Job, Scale
from rex_settings import CURVES, PLATEAU_PATIENCE, SCHEDULES, SETTINGS
from rex_stack import Run, Stack

import lrs_ext

EVERY_SETTING = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
TINY = Scale(0.01, (10, 100), (0, 1), (100,), (-1, 0), 1, (100,))
STEPS = 24


@contextlib.contextmanager
def tiny_scale():
    """Two settings, few held-out digits, a scale of a few updates."""
    chosen = {name: SETTINGS[name] for name in ("CNN, SGD", "VAE, Adam")}
    loads = (rex_settings.load_digits, rex_settings.load_latents)
    with pytest.MonkeyPatch.context() as patch:
        for module in (rex_runs, rex_page):
            patch.setattr(module, "SETTINGS", chosen)
        patch.setattr(rex_settings, "HELD_OUT_DIGITS", 40)
        patch.setattr(bench_rex, "QUICK", TINY)
        for load in loads:
            load.cache_clear()
        yield
    for load in loads:
        load.cache_clear()


@pytest.fixture
def tiny():
    with tiny_scale():
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a run from beginning to end."""
    with tiny_scale():
        return run_tiny(tmp_path_factory.mktemp("rex"), "whole")


# Stacks of models

TORCH = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1.0, momentum=0.9),
    "Adam": lambda params: torch.optim.Adam(params, lr=1.0),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1.0, weight_decay=0.01),
}


def train_alone(setting, run, steps):
    """Trains one model as anybody would, with an optimizer and a plateau of torch."""
    task = setting.task
    model = task.model(0)
    optimizer = TORCH[task.kind](model.parameters())
    group = optimizer.param_groups[0]
    rate = run.rate(setting, steps)
    plateau, check = None, -1
    if run.schedule in PLATEAU_PATIENCE:
        group["lr"] = rate
        patience = round(PLATEAU_PATIENCE[run.schedule] * rex_settings.PLATEAU_CHECKS)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.1, patience=patience
        )
        whole = task.load()[1]["validation"]
        part = {name: values[: setting.check_examples] for name, values in whole.items()}
    for step, batch in enumerate(itertools.islice(task.batches(0), steps)):
        if plateau is None:
            group["lr"] = rate(step)
        elif step * rex_settings.PLATEAU_CHECKS // steps > check >= 0 or check < 0:
            # Twenty checks are due at the first update at or after each twentieth of the run.
            due = math.floor(step * rex_settings.PLATEAU_CHECKS / steps)
            if check >= 0 and due > check:
                model.eval()
                with torch.no_grad():
                    plateau.step(task.loss(model, part))
                model.train()
            check = due
        if run.schedule == "OneCycle":
            momentum = rate.momentum(step)
            if "betas" in group:
                group["betas"] = (momentum, 0.999)
            else:
                group["momentum"] = momentum
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        if setting.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), setting.max_norm)
        optimizer.step()
    model.eval()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return model, weights


@EVERY_SETTING
def test_a_stack_trains_as_single_models_do(setting):
    runs = [Run("REX", -1), Run("OneCycle", -1), Run("plateau 5 %", 0), Run("step", -2)]
    stack = Stack(setting, 0, runs, STEPS)
    before = stack.parameters.detach().clone()
    stack.train()
    found = stack.evaluate("validation")
    batch = setting.task.load()[1]["validation"]
    for i, run in enumerate(runs):
        model, weights = train_alone(setting, run, STEPS)
        moved = (weights - before[i]).abs().max()
        assert (weights - stack.parameters[i]).abs().max() < 2e-3 * moved
        with torch.no_grad():
            assert found[i] == pytest.approx(setting.metric(model, batch).item(), rel=2e-3)


def test_a_model_that_diverges_leaves_the_others_alone():
    setting = SETTINGS["VAE, SGD"]
    runs = [Run("linear", 0), Run("none", 30), Run("linear", 0)]
    stack = Stack(setting, 0, runs, STEPS)
    stack.train()
    alone = Stack(setting, 0, runs[:1], STEPS)
    alone.train()
    values = stack.evaluate("test")
    assert values[1] is None
    assert values[0] == values[2] == pytest.approx(alone.evaluate("test")[0], rel=1e-4)


def test_plateaus_are_reduced_one_by_one(monkeypatch):
    setting = SETTINGS["VAE, SGD"]
    stack = Stack(setting, 0, [Run("plateau 5 %", 0), Run("linear", 0), Run("plateau 10 %", 0)], 40)
    monkeypatch.setattr(stack, "_evaluate", lambda *args: [1.0, 1.0])
    rates = []
    for _ in range(4):
        stack._check_plateaus()
        groups = stack.optimizer.param_groups
        rates.append((groups[0]["lr"] / setting.centre, groups[2]["lr"] / setting.centre))
    # The first check sets the best value; patience 1 acts at the third, patience 2 at the fourth.
    assert rates == [pytest.approx(pair) for pair in [(1, 1), (1, 1), (0.1, 1), (0.1, 0.1)]]


def test_all_curves_and_samplings_can_be_built():
    setting = SETTINGS["CNN, SGD"]
    for name, sampling in itertools.product(CURVES, lrs_ext.SAMPLING):
        rates = Run(name, 1, sampling).rate(setting, 100).values(0, 100)
        assert rates.max() <= setting.centre * 3 * (1 + 1e-12)
    assert set(itertools.chain(*SCHEDULES.values())) <= set(CURVES) | set(PLATEAU_PATIENCE)
    assert Run("step-like", 0).rate(setting, 100)(50) == pytest.approx(
        setting.centre * 0.1, rel=0.01
    )


# The plan


def fake_results(place_jobs, metric):
    """Returns results of jobs as if each run's metric were a function of it."""
    found = {}
    for job in place_jobs:
        values = [metric(run) for run in job.runs]
        found[job] = {"validation": values, "test": values}
    return found


def follow(metric, scale, setting="CNN, SGD", budget=100):
    """Plays a place to its end and returns it with the number of rounds."""
    results, rounds = {}, 0
    while True:
        place = rex_runs.make_place(SETTINGS[setting], budget, scale, results)
        missing = [job for job in place.jobs if job not in results]
        if not missing:
            return place, rounds
        results |= fake_results(missing, metric)
        rounds += 1


def test_grids_widen_until_the_best_is_inside():
    scale = Scale(1.0, (100,), (0,), (100, 101), (-1, 0, 1), 4, ())
    best = {"REX": 3, "linear": -2}
    place, rounds = follow(lambda run: abs(run.exponent - best.get(run.schedule, 0)), scale)
    assert place.chosen["REX"] == Run("REX", 3)
    assert place.chosen["linear"] == Run("linear", -2)
    assert sorted(place.scores["REX"]) == [-1, 0, 1, 2, 3, 4]
    assert sorted(place.scores["cosine"]) == [-1, 0, 1]
    assert not place.at_edge
    assert rounds == 5  # the first grid, 2 and -2, 3 and -3, 4, the test


def test_a_grid_that_stays_too_narrow_is_told():
    scale = Scale(1.0, (100,), (0,), (100,), (-1, 0, 1), 1, ())
    place, _ = follow(
        lambda run: -run.exponent if run.schedule == "WSD" else run.exponent**2, scale
    )
    assert place.at_edge == ["WSD"]
    assert place.chosen["WSD"].exponent == 2


def test_diverged_runs_lose_and_plateau_takes_its_better_patience():
    scale = Scale(1.0, (100,), (0,), (100,), (-1, 0, 1), 2, (100,))
    worth = {"plateau 5 %": 2.0, "plateau 10 %": 1.0}

    def metric(run):
        if run.exponent > 0:
            return None
        return worth.get(run.schedule, 3.0) + abs(run.exponent)

    place, _ = follow(metric, scale)
    assert place.chosen["plateau"] == Run("plateau 10 %", 0)
    assert all(run.exponent == 0 for run in place.chosen.values())
    assert place.profile_exponent == 0
    tested = place.jobs[-1].runs
    assert len(tested) == len(set(tested)) == 12 + 6 * 7 - 5  # five of them are in both tables
    assert [job.phase for job in place.jobs] == ["tuning", "test"]


def test_tuning_and_test_share_no_seed():
    for scale in (rex_runs.FULL, rex_runs.QUICK):
        assert not set(scale.seeds) & set(scale.tuning_seeds)


def test_only_the_test_phase_reads_the_test_set(monkeypatch):
    asked = []
    original = Stack.evaluate
    monkeypatch.setattr(
        Stack, "evaluate", lambda self, split: (asked.append(split), original(self, split))[1]
    )
    for phase in ("tuning", "test"):
        row = rex_runs.run_job(Job(phase, "VAE, Adam", 1, 3, 0, (Run("REX", 0),)))
        assert ("test" in row) == (phase == "test")
    assert asked == ["validation", "validation", "test"]


# The whole of it, resumed


def run_tiny(tmp_path, name):
    results = tmp_path / f"{name}.jsonl"
    assert bench_rex.main(["--quick", "--workers", "1", "--results", str(results)]) == 0
    return results


def report(results, folder):
    options = ["--quick", "--report", "--results", str(results), "--folder", str(folder)]
    assert bench_rex.main(options) == 0
    document = json.loads((folder / "rex.json").read_text())
    assert (folder / "rex.json").read_text().count("\n") > len(document["jobs"])
    for job in document["jobs"]:
        del job["seconds"], job["processor_seconds"]
    del document["machine"]
    return document


def test_a_killed_run_goes_on_to_the_same_numbers(whole, tiny, tmp_path, capsys, monkeypatch):
    lines = whole.read_text().splitlines()
    killed = tmp_path / "killed.jsonl"
    killed.write_text("\n".join(lines[:5]) + "\n" + lines[5][:40])  # in the midst of a line
    ran = []
    original = rex_runs.run_job
    monkeypatch.setattr(bench_rex, "run_job", lambda job: (ran.append(job), original(job))[1])
    run_tiny(tmp_path, "killed")
    assert "| REX d=0.9 " in capsys.readouterr().out
    assert len(ran) == len(lines) - 5
    monkeypatch.setattr(bench_rex, "SPEED", tmp_path / "none.json")
    first, second = report(whole, tmp_path / "a"), report(killed, tmp_path / "b")
    assert first == second
    assert first["missing"] == []
    ran.clear()
    options = ["--quick", "--workers", "1", "--results", str(tmp_path / "new.jsonl")]
    stored = tmp_path / "a" / "rex.json"
    assert bench_rex.main([*options, "--start-from", str(stored)]) == 0
    assert not ran

    page = (tmp_path / "a" / "rex.md").read_text()
    for text in ("## Table 1, beside the paper's", "73 / 95", "## Where REX does not win"):
        assert text in page
    assert "Not finished" not in page
    assert (tmp_path / "a" / "rex.png").stat().st_size > 10_000


def test_a_page_of_half_a_run_names_what_is_missing(whole, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_rex, "SPEED", tmp_path / "none.json")
    results = tmp_path / "half.jsonl"
    kept = [
        line
        for line in whole.read_text().splitlines()
        if json.loads(line)["budget"] == 10 or json.loads(line)["setting"] == "CNN, SGD"
    ]
    results.write_text("\n".join(kept))
    document = report(results, tmp_path)
    assert document["missing"] == [["VAE, Adam", 100]]
    page = (tmp_path / "rex.md").read_text()
    assert "**Not finished**, and so not in any table: VAE, Adam: 100 %." in page


def test_a_report_without_results_says_what_to_do(tmp_path, capsys):
    assert bench_rex.main(["--report", "--results", str(tmp_path / "none.jsonl")]) == 1
    assert "run this without --report" in capsys.readouterr().err


def test_bad_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench_rex.main(["--workers", "0"])
    assert "--workers must be at least 1, got 0" in capsys.readouterr().err


def test_missing_packages_are_named_before_anything_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench_rex, "NEEDED", ("torch", "no_such_package"))
    assert bench_rex.main(["--results", str(tmp_path / "none.jsonl")]) == 1
    assert "no_such_package missing: pip install 'lrs_ext[bench]'" in capsys.readouterr().err


def test_jobs_bring_forth_jobs():
    done = []

    def missing():
        return [n for n in (1, 2, 3) if n not in done and (n == 1 or n - 1 in done)]

    for job, row in job_runner.finished(double, missing, workers=2):
        done.append(job)
        assert row == {"value": 2 * job}
    assert done == [1, 2, 3]


def double(n):
    return {"value": 2 * n}


def test_speed_is_measured(monkeypatch):
    monkeypatch.setattr(rex_speed, "SETTINGS", {"VAE, SGD": SETTINGS["VAE, SGD"]})
    monkeypatch.setattr(rex_speed, "SIZES", (1, 3))
    monkeypatch.setattr(rex_speed, "ROUNDS", 1)
    (row,) = rex_speed.measure()
    assert list(row["rates"]) == ["0", "1", "3"]
    assert min(row["rates"].values()) > 0
    assert "plain loop" in rex_page.speed_table([row])
