"""AutoLRS on several ranks: one decision for all, trials at once, and resuming on other numbers."""

import functools
import math

import autolrs_rank_jobs as jobs
import numpy as np
import pytest
from ranks import ranks

TORCH = {"optimizer": "torch adamw"}
KINDS = {
    "peak": {},
    "paper": {"preset": "paper"},
    "torch": TORCH,
    "fsdp": {**TORCH, "wrapper": "fsdp"},
    "fsdp paper": {**TORCH, "wrapper": "fsdp", "preset": "paper"},
    "judged": {"judge": True},
    "fsdp judged": {**TORCH, "wrapper": "fsdp", "judge": True},
}
WAVES = {
    "peak": {"parallel_trials": True},
    "paper": {"parallel_trials": True, "preset": "paper", "optimizer": "sgd"},
    "judged": {"parallel_trials": True, "judge": True},
}


def call(engine, size, function, *args):
    return ranks(size, engine).call(f"autolrs_rank_jobs:{function}", *args)


@functools.cache
def whole_run(engine, size, **options):
    """What every rank has found in an undisturbed run."""
    return call(engine, size, "whole", options)


def same_but_own(results):
    """The result of the first rank, after a check that those of others are equal bit for bit."""
    for result in results:
        assert {**result, "own losses": None, "used": None} == {
            **results[0],
            "own losses": None,
            "used": None,
        } or has_nan_alike(result, results[0])
    return results[0]


def has_nan_alike(first, second):
    names = first.keys() - {"own losses", "used"}
    return all(repr(first[name]) == repr(second[name]) for name in names)


def close(first, second):
    """Checks that rounding is all that differs, also where it grows in a trial at a high rate."""
    for name in ("rates", "best", "weights"):
        assert np.allclose(first[name], second[name], rtol=1e-3, atol=1e-5), name
    assert np.allclose(first["losses"][-20:], second["losses"][-20:], rtol=1e-3)


# One trial at a time


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_decide_alike_and_as_one_process_would(engine, kind):
    results = whole_run(engine, 2, **KINDS[kind])
    first = same_but_own(results)
    assert all(result["used"] == results[0]["used"] for result in results)
    assert results[0]["own losses"] != results[1]["own losses"]
    mean = np.mean([result["own losses"] for result in results], axis=0)
    assert np.allclose(first["losses"], mean, rtol=1e-6)
    for stage in first["first losses"]:
        assert len(set(stage)) == 1  # rolled back bit by bit
    close(first, whole_run(engine, 1, **KINDS[kind])[0])


def test_four_ranks_decide_alike():
    close(same_but_own(whole_run("gloo", 4)), whole_run("gloo", 1)[0])


@pytest.mark.parametrize("kind", ["peak", "torch", "fsdp"])
def test_a_divergence_in_a_trial_on_one_rank_is_everybodys(engine, kind):
    first = same_but_own(call(engine, 2, "diverging_trial", KINDS[kind], 1, 10))
    assert first["objectives"][0][1] == math.inf
    assert np.isfinite(first["objectives"][0][0])
    assert math.isnan(first["losses"][10])
    assert np.isfinite(first["weights"]).all()


@pytest.mark.parametrize("kind", ["peak", "fsdp"])
def test_a_divergence_in_training_on_one_rank_rolls_all_back(engine, kind):
    first = same_but_own(call(engine, 2, "diverging_training", KINDS[kind], 1))
    undisturbed = same_but_own(whole_run(engine, 2, **KINDS[kind]))
    assert np.isfinite(first["weights"]).all()
    assert 0.0 < first["rates"][-2] < 0.51 * undisturbed["rates"][-2]


@pytest.mark.parametrize("kind", ["peak", "paper", "torch"])
def test_nothing_is_read(engine, kind):
    first, second = call(engine, 2, "without_reading", KINDS[kind])
    assert first == second > 0.0


def test_ranks_with_other_arguments_are_told(engine):
    for kind, text in call(engine, 2, "made_with_own_budget", {}):
        assert kind == "RuntimeError"
        assert "equal arguments on all ranks; on rank 1 total_steps is 160, on rank 0 150, " in text


# Resuming


@pytest.mark.parametrize("stop", [3, 20, 90])
@pytest.mark.parametrize("kind", ["peak", "paper", "fsdp"])
def test_a_run_goes_on_bit_by_bit_where_each_rank_loads_its_own(engine, kind, stop, tmp_path):
    options = {**KINDS[kind], "is_random": True}
    whole = whole_run(engine, 2, **options)
    found = call(engine, 2, "resumed", options, stop, str(tmp_path), "each")
    assert same_but_own(found) == {**same_but_own(whole), "own losses": ..., "used": ...} | {
        name: found[0][name] for name in ("own losses", "used")
    }


@pytest.mark.parametrize("how", ["first", "dcp"])
@pytest.mark.parametrize("stop", [20, 90])
@pytest.mark.parametrize("kind", ["peak", "paper", "torch"])
def test_one_checkpoint_serves_all_ranks(engine, kind, stop, how, tmp_path):
    whole = same_but_own(whole_run(engine, 2, **KINDS[kind]))
    found = same_but_own(call(engine, 2, "resumed", KINDS[kind], stop, str(tmp_path), how))
    for name in ("rates", "losses", "weights", "objectives"):
        assert found[name] == whole[name]


@pytest.mark.parametrize("stop", [20, 90])
@pytest.mark.parametrize("kind", ["peak", "paper", "fsdp"])
def test_a_distributed_checkpoint_of_two_goes_on_on_one_and_on_four(kind, stop, tmp_path):
    whole = same_but_own(call("gloo", 2, "save_dcp", KINDS[kind], stop, str(tmp_path / "dcp")))
    one = jobs.load_dcp(KINDS[kind], str(tmp_path / "dcp"))
    four = same_but_own(call("gloo", 4, "load_dcp", KINDS[kind], str(tmp_path / "dcp")))
    for found in (one, four):
        assert found["losses"][:stop] == whole["losses"][:stop]
        ended = stop // 8 if kind != "paper" else stop // 10
        assert found["objectives"][0][:ended] == whole["objectives"][0][:ended]
        close(found, whole)


@pytest.mark.parametrize("kind", ["peak", "paper"])
@pytest.mark.parametrize("waves", [False, True])
def test_the_state_is_the_same_on_every_rank(engine, kind, waves):
    options = WAVES[kind] if waves else KINDS[kind]
    for first, second in zip(
        *call(engine, 2, "states", options, (0, 3, 8, 20, 60, 120)), strict=True
    ):
        assert first == second


# Trials at once


@pytest.mark.parametrize("kind", WAVES)
def test_trials_at_once_are_paired_and_undone(engine, kind):
    first = same_but_own(whole_run(engine, 2, **WAVES[kind], is_random=True))
    stages = zip(first["first losses"], first["starts"], first["tried"], strict=True)
    for losses, starts, tried in stages:
        assert len(set(losses)) == 1
        assert len(set(tried)) == len(tried)
        assert starts[0] == starts[1] < starts[2] == starts[3]
    assert first["losses"][-1] < 0.5 * first["losses"][0]


def test_gradients_are_averaged_but_in_trials_at_once(engine):
    results = call(engine, 2, "averaging", WAVES["peak"])
    for found, _ in results:
        search = 4 * 8  # 8 trials by twos
        assert [sync for sync, _ in found] == [False] * search + [True] * (150 - search)
        assert all(equal for _, equal in found[search:])
        ends = range(7, search, 8)  # a restored rank equals the others again
        assert [equal for _, equal in found[:search]].count(True) == len(ends)
        assert all(found[end][1] for end in ends)
    (_, first), (_, second) = results
    assert first[:32] == second[:32]
    assert first[:8] * 4 == first[:32]
    assert first[32:40] != second[32:40]  # training begins with the batches of each


def test_trials_at_once_take_a_fraction_of_the_updates(engine):
    alone, at_once = (
        same_but_own(whole_run(engine, 2, **options)) for options in ({}, {"parallel_trials": True})
    )
    assert len(alone["tried"][0]) == len(at_once["tried"][0]) == 8
    assert alone["starts"][0][-1] + 8 == 64
    assert at_once["starts"][0][-1] + 8 == 32
    assert at_once["tried"][0][:6] == alone["tried"][0][:6]
    assert math.isclose(math.log10(at_once["best"][0]), math.log10(alone["best"][0]), abs_tol=0.5)


def test_more_ranks_than_candidates_share_them():
    options = {"parallel_trials": True, "num_trials": 3}
    first = same_but_own(whole_run("gloo", 4, **options))
    assert first["starts"] == [[0, 0, 8]]
    assert np.isfinite(first["objectives"][0]).all()
    four = same_but_own(whole_run("gloo", 4, parallel_trials=True))
    assert four["starts"] == [[0] * 4 + [8] * 2 + [16] * 2]  # PEAK gives num_trials


def test_a_single_trial_is_one_of_all_ranks_together():
    options = {"preset": "paper", "num_trials": 1}
    alone = same_but_own(whole_run("gloo", 2, **options))
    assert alone == same_but_own(whole_run("gloo", 2, **options, parallel_trials=True))


@pytest.mark.parametrize("how", ["each", "first", "dcp"])
@pytest.mark.parametrize("stop", [3, 11, 60])
def test_trials_at_once_begin_again_where_they_are_resumed(engine, stop, how, tmp_path):
    whole = same_but_own(whole_run(engine, 2, **WAVES["peak"]))
    found = same_but_own(call(engine, 2, "resumed", WAVES["peak"], stop, str(tmp_path), how))
    for name in ("rates", "losses", "weights", "objectives"):
        assert found[name] == whole[name], name


def test_a_divergence_among_trials_at_once_is_that_candidates_only(engine):
    first = same_but_own(call(engine, 2, "diverging_trial", WAVES["peak"], 1, 10))
    assert [math.isinf(value) for value in first["objectives"][0]] == [
        index == 3 for index in range(8)
    ]


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"wrapper": "fsdp", **TORCH}, "ValueError", "whole model on every rank"),
        ({"wrapper": "none"}, "TypeError", "pass the DistributedDataParallel"),
    ],
)
def test_what_cannot_try_at_once_is_refused(engine, options, kind, text):
    for found in call(engine, 2, "made", {**options, "parallel_trials": True}):
        assert found[0] == kind
        assert text in found[1]


def test_one_process_tries_one_after_another():
    assert jobs.made({"parallel_trials": True})[0] == "TypeError"
