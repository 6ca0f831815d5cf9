"""ZeroRedundancyOptimizer: its consolidated checkpoints have the position in the schedule."""

import cases
import pytest
from ranks import ranks

names = pytest.mark.parametrize("name", cases.OPTIMIZERS)


def call(engine, function, *args, size=2):
    return ranks(size, engine).call(f"rank_checks_zero:{function}", *args)


@names
def test_a_run_goes_on_where_it_was(engine, name, tmp_path):
    call(engine, "goes_on", name, "float32", str(tmp_path))


def test_blocks_go_on_where_they_were(engine, tmp_path):
    call(engine, "goes_on", "AdamW", "blocks", str(tmp_path))


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_another_number_of_ranks_goes_on(name, tmp_path):
    saved = (name, "float32", str(tmp_path))
    (expected, params), _ = call("gloo", "saved_and_gone_on", *saved)
    for size in (1, 4):
        for numbers, own in call("gloo", "loaded_and_gone_on", *saved, size=size):
            assert numbers == expected
            assert own == params


@pytest.mark.parametrize(
    "check",
    [
        "a_saved_state_stays_as_it_is",
        "a_rank_without_parameters_keeps_up",
        "a_rank_without_gradients_keeps_up",
        "a_plateau_reduces_the_rates_of_every_rank",
        "errors_say_the_way_out",
        "a_group_that_is_added_leaves_the_schedules_in_charge",
    ],
)
def test_shares(engine, check):
    call(engine, check)


@pytest.mark.parametrize(
    "check",
    [
        "updates_that_only_the_device_knows_of_count",
        "a_position_that_is_out_of_date_is_not_believed",
        "what_the_host_changes_after_loading_counts",
    ],
)
def test_positions(engine, check, tmp_path):
    call(engine, check, str(tmp_path))
