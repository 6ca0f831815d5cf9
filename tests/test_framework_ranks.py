"""Fully sharded models in Accelerate and in the Hugging Face Trainer, on two ranks."""

import pytest
from ranks import ranks

pytest.importorskip("transformers", reason="transformers is not installed: lrs_ext[transformers]")


def call(engine, function, *args):
    return ranks(2, engine).call(f"rank_checks_frameworks:{function}", *args, timeout=180.0)


def test_accelerate_leaves_its_plugin_alone_on_cpus():
    assert call("gloo", "plugin_is_left_alone_on_cpus") == ["DistributedDataParallel"] * 2


def test_what_accelerate_shards_goes_on_bit_by_bit(engine, tmp_path):
    call(engine, "prepared_runs_go_on", str(tmp_path))


def test_a_trainer_that_shards_goes_on_bit_by_bit(engine, tmp_path):
    first, second = call(engine, "trainers_go_on", str(tmp_path))
    assert first == second
    assert len(first) == 6


def test_a_trainer_that_shards_searches(engine, tmp_path):
    first, second = call(engine, "trainers_search", str(tmp_path))
    assert first == second
    rates, losses, best = first
    assert len(rates) == len(losses) == 40
    assert 1e-4 <= best <= 1.0
    assert losses[-1] < losses[0]
