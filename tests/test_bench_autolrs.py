"""The benchmark of AutoLRS: its tasks, contestants, runner and page, in small."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import autolrs_contestants
import autolrs_page
import autolrs_tasks
import bench_autolrs
from autolrs_contestants import CONTESTANTS, GRID
from autolrs_tasks import TASKS
from bench_autolrs import Job, make_job, parse_spec, plan

import lrs_ext
from lrs_ext.autolrs import search, timetable

EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
STEPS = 120
SPECS = {
    **{name: name for name in CONTESTANTS},
    "auto": "auto num_trials=3 trial_steps=8",
    "paper": "paper num_trials=4 trial_steps=5",
}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# Tasks


@EVERY_TASK
def test_loss_falls_and_equal_seeds_give_equal_runs(task):
    def run(seed):
        model = task.model(seed)
        schedule = lrs_ext.cosine(task.centre, total_steps=50)
        optimizer = task.optimizer(model.parameters(), schedule)
        before = float(task.evaluate(model, "test"))
        batches = itertools.islice(task.batches(seed), 50)
        assert autolrs_contestants.train(task, model, optimizer, batches) == 50
        return before, float(task.evaluate(model, "test")), weights(model)

    before, after, end = run(0)
    assert after < 0.99 * before
    torch.random.manual_seed(99)  # nothing depends on torch's own generator
    assert run(0)[1] == after
    assert not torch.equal(run(1)[2], end)


@EVERY_TASK
def test_streams_begin_anew_and_differ_by_seed(task):
    def first(stream):
        return [
            torch.cat([part.double().flatten() for part in batch.values()])
            for batch in itertools.islice(stream, 2)
        ]

    stream = task.batches(0)
    one, again, other = first(stream), first(stream), first(task.batches(1))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


@EVERY_TASK
def test_evaluation_reads_no_state_and_leaves_none(task):
    model = task.model(0)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    losses = [float(task.evaluate(model, "test")) for _ in range(2)]
    assert losses[0] == losses[1] != float(task.evaluate(model, "validation"))
    assert model.training
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_splits_are_disjoint():
    images, labels = autolrs_tasks.digits()
    assert sum(map(len, labels.values())) == 1797
    sets = [{tuple(pixels) for pixels in images[split][4].flatten(1).tolist()} for split in images]
    assert all(a.isdisjoint(b) for a, b in itertools.combinations(sets, 2))

    texts = {split: bytes(part.tolist()) for split, part in autolrs_tasks.text().items()}
    for split, other in itertools.permutations(texts, 2):
        middle = len(texts[split]) // 2
        assert texts[split][middle : middle + 2000] not in texts[other]

    covered = []
    inside = 640 * torch.arange(8).unsqueeze(1) + torch.arange(8)
    for pixels, starts in autolrs_tasks.photos().values():
        used = torch.zeros(len(pixels), dtype=torch.bool)
        used[(starts.unsqueeze(1) + inside.flatten()).flatten()] = True
        covered.append(used)
    assert torch.stack(covered).sum(0).eq(1).all()  # every pixel belongs to one split


# Contestants


@pytest.mark.parametrize("name", CONTESTANTS)
@pytest.mark.parametrize("task", ["digits", "vae"])
def test_contestants_train(name, task):
    contestant = CONTESTANTS[name]
    if not contestant.is_available:
        pytest.skip(f"{contestant.package} is not installed")
    options = contestant.defaults | parse_spec(SPECS[name])[1]
    outcome = contestant.run(TASKS[task], STEPS, 0, options)
    assert outcome.updates == STEPS
    assert 0 <= outcome.search_updates < STEPS
    assert not torch.equal(weights(outcome.model), weights(TASKS[task].model(0)))
    loss = float(TASKS[task].evaluate(outcome.model, "test"))
    # D-Adaptation starts slowly and then overshoots: 120 updates are too few for it.
    assert loss < bench_autolrs.untrained_loss(task, 0) or name == "dadapt"


def test_auto_searches_within_its_budget_and_takes_constants():
    options = {"decades": 2.0, "num_trials": 3, "trial_steps": 8}
    plain = CONTESTANTS["auto"].run(TASKS["photos"], STEPS, 0, options)
    assert plain.search_updates == 24
    assert plain.trials[0][0] == pytest.approx(0.01)
    assert 0.01 <= plain.lr <= 1.0
    constants = {"search.MARGIN_DECADES": 0.0, "timetable.TRIAL_STEPS": [9, 9]}
    options = {"decades": 2.0, "num_trials": 3} | constants
    originals = search.MARGIN_DECADES, timetable.TRIAL_STEPS
    changed = CONTESTANTS["auto"].run(TASKS["photos"], STEPS, 0, options)
    assert changed.search_updates == 27
    assert originals == (search.MARGIN_DECADES, timetable.TRIAL_STEPS)
    with pytest.raises(ValueError, match=r"lrs_ext\.autolrs\.search has no SPEED"):
        CONTESTANTS["auto"].run(TASKS["photos"], STEPS, 0, {"search.SPEED": 1})


def test_a_diverged_run_is_cut_short_and_has_a_finite_loss():
    row = bench_autolrs.run_job(make_job("photos", "cosine offset=2", 300, 0))
    assert row["diverged"]
    assert row["updates"] < 300
    assert row["test_loss"] == 2 * bench_autolrs.untrained_loss("photos", 0)


# Runner


def test_specs():
    assert parse_spec("auto decades=2 schedule=linear") == (
        "auto",
        {"decades": 2.0, "schedule": "linear"},
    )
    assert make_job("vae", "auto", 500, 0) == make_job("vae", "auto decades=4", 500, 0)
    with pytest.raises(ValueError, match="no contestant 'magic'"):
        parse_spec("magic")
    with pytest.raises(ValueError, match=r"give decades a value, such as decades=0\.1"):
        parse_spec("auto decades")


def test_plan_expands_grids_without_duplicates():
    jobs = plan(["vae", "gpt"], ["cosine", "cosine offset=0", "auto"], [500], range(2))
    assert len(jobs) == len(set(jobs)) == 2 * 2 * (len(GRID) + 1)
    assert {job.seed for job in jobs[: len(jobs) // 2]} == {0}


def test_results_resume_and_half_lines_are_ignored(tmp_path, capsys):
    results = tmp_path / "new" / "autolrs.jsonl"
    command = ["--tasks", "photos", "--budgets", "40", "--seeds", "1", "--workers", "1"]
    command += ["--results", str(results), "--contestants", "cosine offset=0", "auto"]
    assert bench_autolrs.main(command) == 1  # 40 updates are too few for 6 trials
    assert "total_steps > 48" in capsys.readouterr().out
    rows = {row["contestant"]: row for row in bench_autolrs.read_rows([results])}
    assert "error" in rows["auto"]
    with results.open("a") as file:
        file.write('{"task": "photos", "cont')
    command += ["rex offset=0", "--workers", "2"]
    command.remove("auto")
    assert bench_autolrs.main(command) == 0
    output = capsys.readouterr()
    assert "2 runs, 1 of them done" in output.err
    assert "rex, best of grid" in output.out
    again = {row["contestant"]: row for row in bench_autolrs.read_rows([results])}
    assert again["cosine"] == rows["cosine"]
    assert again["cosine"]["updates"] == again["rex"]["updates"] == 40


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "chess"], "no task 'chess'"),
        (["--contestants", "magic"], "no contestant 'magic'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--budgets", "500,0"], "--budgets must be positive, got 0"),
        (["--budgets", "1e3"], "--budgets: must be integers such as 500,1000, got 1e3"),
    ],
)
def test_arguments_are_checked(words, message, capsys):
    with pytest.raises(SystemExit):
        bench_autolrs.parse_args(words)
    assert message in capsys.readouterr().err


# Page


def row(task, spec, seed, loss, total_steps=3000, **more):
    job = make_job(task, spec, total_steps, seed)
    result = {
        "test_loss": loss,
        "validation_loss": loss,
        "diverged": False,
        "seconds": 2.0,
        "processor_seconds": 1.5,
        "updates": total_steps,
        "search_share": 0.1 if spec.startswith("auto") else 0.0,
        "lr": 0.01,
        "code": "abc",
    }
    return bench_autolrs.dataclasses.asdict(job) | result | more


@pytest.fixture
def rows():
    """Made-up results: the best peak of cosine is one decade above the middle."""
    found = []
    for seed, task in itertools.product(range(3), ("photos", "text")):
        luck = 1.0 + 0.01 * seed
        for offset in GRID:
            found.append(row(task, f"cosine offset={offset}", seed, luck * (1 + abs(offset - 1))))
        found.append(row(task, "rex offset=1", seed, 0.9 * luck))
        found.append(row(task, "auto", seed, luck * (1.05 if task == "text" else 0.95)))
        found.append(row(task, "auto search.MARGIN_DECADES=0", seed, 1.2 * luck))
        found.append(row(task, "prodigy", seed, 0.9 * luck))
    failed = make_job("text", "dadapt", 3000, 0)
    return [*found, bench_autolrs.dataclasses.asdict(failed) | {"error": "ValueError: no | way"}]


def test_page_compares_seed_by_seed_with_the_best_peak(rows):
    places = autolrs_page.by_task_and_budget(rows)
    cells = {cell.label: cell for cell in autolrs_page.line_up(places[3000, "text"])}
    baseline = cells["cosine, best of grid"]
    assert autolrs_page.best_offset(rows, "text", 3000, "cosine") == 1.0
    assert autolrs_page.best_offset(rows, "gpt", 3000, "cosine") is None
    assert cells["cosine, 10x too low"].relative(baseline) == pytest.approx(2.0)
    assert cells["cosine, 10x too high"].relative(baseline) == pytest.approx(2.0)
    assert cells["AutoLRS"].ratios(baseline) == pytest.approx([1.05] * 3)
    jobs = {(job.contestant, job.options) for job in bench_autolrs.long_plan(rows)}
    peaks = {json.loads(options)["offset"] for name, options in jobs if name == "cosine"}
    assert peaks == {0.5, 1.0, 1.5}
    assert ("auto", '{"decades": 4.0}') in jobs


def without_spaces(tables):
    return re.sub(r" *\| *", "|", tables)


def test_page_renders(rows, tmp_path):
    numbers, page, picture = autolrs_page.write(rows, tmp_path)
    text = page.read_text()
    lines = [line.split() for line in text.splitlines()]
    assert ["|", "AutoLRS", "|", "1.050", "|", "0.950", "|", "0.999", "|"] in lines
    assert "|3,000|cosine, 10x too low|6|100%|100%|2.000|" in without_spaces(text)
    assert "|AutoLRS|1.0605|1.050|0.000|1.050|0-2|" in without_spaces(text)
    assert "text, 3,000 updates: 5.0% behind cosine, best of grid" in text
    assert "photos, 3,000 updates: 5.6% behind prodigy" in text
    assert "AutoLRS, search.MARGIN_DECADES=0 | " in text
    assert "dadapt: 1 runs failed: ValueError: no | way" in text
    assert "greedy: not run (pip install transformers)" in text
    assert "mixed" not in text
    assert picture.stat().st_size > 10_000
    runs = json.loads(numbers.read_text())["runs"]
    assert all(len(run["test_loss"]) == 3 for run in runs)
    assert "of 2 versions" in autolrs_page.render([*rows, row("text", "auto", 5, 1.0, code="x")])


def test_page_of_little(rows):
    assert "Nothing was compared." in autolrs_page.render([rows[-1]])
    assert autolrs_page.summary([]) == "Nothing to compare with: run cosine, too."
    one_seed = [r for r in rows if r["seed"] == 0]
    assert "5.0% behind cosine, best of grid, one seed" in autolrs_page.render(one_seed)


def test_keys_are_stable():
    job = Job("vae", "auto", '{"decades": 4.0}', 500, 3)
    assert job.key == '["vae", "auto", "{\\"decades\\": 4.0}", 500, 3]'
    assert bench_autolrs.job_of(bench_autolrs.dataclasses.asdict(job) | {"more": 1}) == job
