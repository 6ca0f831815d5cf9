"""AutoLRS with the optimizers of `lrs_ext` on fully sharded models (FSDP2)."""

import functools

import autolrs_shard_jobs as jobs
import cases
import numpy as np
import pytest
from autolrs_runs import PRESETS
from ranks import ranks
from test_autolrs_ranks import close, same_but_own

names = pytest.mark.parametrize("name", cases.OPTIMIZERS)


def call(engine, size, function, *args):
    return ranks(size, engine).call(f"autolrs_shard_jobs:{function}", *args)


@functools.cache
def whole_run(engine, size, **options):
    """What every rank has found in an undisturbed run."""
    return call(engine, size, "whole", options)


def decisions(result):
    return {name: result[name] for name in ("rates", "tried", "best")}


def assert_all_equal(found, expected):
    for name in expected.keys() - {"own losses", "used"}:
        assert found[name] == expected[name], name


@names
def test_equal_batches_make_it_one_process_to_the_bit(engine, name):
    """The mean of two equal gradients is exact, and so is everything that follows."""
    found = whole_run(engine, 2, name=name, is_whole=True)
    (alone,) = whole_run(engine, 1, name=name, is_whole=True)
    assert all(result == alone for result in found)


def test_equal_batches_make_stages_one_process_to_the_bit(engine):
    found = whole_run(engine, 2, preset="paper", is_whole=True)
    (alone,) = whole_run(engine, 1, preset="paper", is_whole=True)
    assert all(result == alone for result in found)


@names
def test_parts_of_batches_make_the_decisions_of_one_process(engine, name):
    found = whole_run(engine, 2, name=name)
    first = same_but_own(found)
    (alone,) = whole_run(engine, 1, name=name)
    assert decisions(first) == decisions(alone)
    assert found[0]["own losses"] != found[1]["own losses"]
    mean = np.mean([result["own losses"] for result in found], axis=0)
    assert np.allclose(first["losses"], mean, rtol=1e-6)
    if name != "LAMB":  # whose updates of a tensor of one element are signs
        close(first, alone)


@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_sharded_and_data_parallel_runs_are_equal_to_the_bit(name):
    for sharded, whole in zip(
        whole_run("gloo", 2, name=name), whole_run("gloo", 2, name=name, wrapper="ddp"), strict=True
    ):
        assert sharded == whole


def test_a_rank_that_holds_nothing_runs_along():
    first = same_but_own(whole_run("gloo", 4, name="AdamW"))
    close(first, whole_run("gloo", 1, name="AdamW")[0])


def test_parameters_released_in_the_backward_pass_are_the_same_run(engine):
    for found, expected in zip(
        whole_run(engine, 2, name="AdamW", releases=True),
        whole_run(engine, 2, name="AdamW"),
        strict=True,
    ):
        assert found == expected


UNDONE = [
    {"name": "SGD"},
    {"name": "Lion", "storage": "blocks"},
    {"name": "LAMB", "clips": True},
    {"name": "Adam", "preset": "paper", "policy": "mixed", "clips": True},
    *({"name": "AdamW", "storage": storage, "policy": "mixed"} for storage in jobs.STORAGES),
    {"name": "AdamW", "storage": "blocks", "preset": "paper"},
    {"name": "AdamW", "releases": True},
]


@pytest.mark.parametrize(
    "options", UNDONE, ids=lambda options: "-".join(map(str, options.values()))
)
def test_trials_are_undone_to_the_bit(engine, options):
    plan = PRESETS[options.get("preset", "peak")]
    count = plan["num_trials"] * len(plan.get("stage_steps", (0,)))
    for trials, moves in call(engine, 2, "trials_are_undone", options):
        assert trials == count
        assert moves >= trials


def test_nothing_is_gathered(engine):
    for found in call(engine, 2, "collectives_of_the_controller", {}):
        assert found == {"c10d.allreduce_", "c10d.broadcast_"}


def test_nothing_is_read(engine):
    first, second = call(engine, 2, "without_reading", {"name": "AdamW"})
    assert first == second > 0.0


def test_a_part_that_is_not_finite_rolls_all_back(engine):
    first = same_but_own(call(engine, 2, "diverging_training", {"name": "AdamW"}, 1))
    undisturbed = same_but_own(whole_run(engine, 2, name="AdamW"))
    assert np.isfinite(first["weights"]).all()
    assert np.isfinite(np.concatenate([np.ravel(part) for part in first["states"]])).all()
    assert 0.0 < first["rates"][-2] < 0.51 * undisturbed["rates"][-2]


# Resuming

RESUMED = [
    ({"name": "AdamW"}, 3),
    ({"name": "AdamW"}, 20),
    ({"name": "AdamW"}, 90),
    ({"name": "SGD", "preset": "paper"}, 20),
    ({"name": "LAMB"}, 20),
    ({"name": "AdamW", "storage": "bfloat16"}, 20),
    ({"name": "AdamW", "storage": "blocks"}, 20),
    ({"name": "AdamW", "storage": "blocks"}, 90),
    ({"name": "AdamW", "storage": "split", "policy": "mixed"}, 90),
]


@pytest.mark.parametrize("how", ["each", "dcp"])
@pytest.mark.parametrize(("options", "stop"), RESUMED, ids=str)
def test_a_run_goes_on_bit_by_bit(engine, options, stop, how, tmp_path):
    found = call(engine, 2, "resumed", options, stop, str(tmp_path), how)
    for result, expected in zip(found, whole_run(engine, 2, **options), strict=True):
        assert_all_equal(result, expected)


@pytest.mark.parametrize("stop", [20, 90])
def test_another_ranks_part_is_refused(engine, stop, tmp_path):
    first, second = call(engine, 2, "first_of_all", {"name": "AdamW"}, stop, str(tmp_path))
    assert first is None
    assert "the copy of the training state belongs to what another rank has" in second


def test_a_loss_that_is_spread_is_refused(engine):
    for text in call(engine, 2, "loss_that_is_spread", {"name": "AdamW"}):
        assert "got a DTensor with placements (Partial(sum),): pass its .full_tensor()" in text


MOVED = [
    ({"name": "AdamW"}, 20),
    ({"name": "AdamW"}, 90),
    ({"name": "SGD", "preset": "paper"}, 90),
]


@pytest.mark.parametrize(("options", "stop"), MOVED, ids=str)
def test_a_distributed_checkpoint_goes_on_on_one_and_on_four(options, stop, tmp_path):
    folder = str(tmp_path / "dcp")
    saved = same_but_own(call("gloo", 2, "save_dcp", options, stop, folder))
    for size in (1, 4):
        found = same_but_own(call("gloo", size, "load_dcp", options, folder))
        assert found["losses"][:stop] == saved["losses"][:stop]
        close(found, saved)


@pytest.mark.parametrize("storage", ["bfloat16", "blocks", "split"])
def test_rounded_states_go_on_on_four_ranks(storage, tmp_path):
    """Other parts are rounded by other bits."""
    options, folder = {"name": "AdamW", "storage": storage}, str(tmp_path / "dcp")
    saved = same_but_own(call("gloo", 2, "save_dcp", options, 90, folder))
    found = same_but_own(call("gloo", 4, "load_dcp", options, folder))
    assert found["losses"][:90] == saved["losses"][:90]
    assert decisions(found) == decisions(saved)
    assert np.allclose(found["losses"][-20:], saved["losses"][-20:], rtol=0.2)
