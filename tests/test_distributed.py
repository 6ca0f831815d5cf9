"""Several ranks: DDP, FSDP2, tensor parallelism, ZeRO, distributed checkpoints.

The checks stand in rank_checks*.py and run in processes that all tests share.
"""

import re
from pathlib import Path

import cases
import pytest
import ranks

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"
names = pytest.mark.parametrize("name", cases.OPTIMIZERS)
SIZES = (2, 4)
TWO_GPUS = pytest.param((2, "nccl"), id="nccl", marks=pytest.mark.two_gpus)


@pytest.fixture(scope="module", autouse=True)
def end_processes():
    yield
    ranks.stop_all()


@pytest.fixture(params=[*(pytest.param((size, "gloo"), id=f"{size}") for size in SIZES), TWO_GPUS])
def call(request):
    """Runs a check on 2 or 4 ranks, or on 2 GPUs."""
    return ranks.ranks(*request.param).call


@pytest.fixture(params=[pytest.param((2, "gloo"), id="2"), TWO_GPUS])
def call_two(request):
    return ranks.ranks(*request.param).call


# Steps and norms.


@pytest.mark.parametrize("how", ["shard", "replicate", "columns", "hybrid", "blocks"])
def test_steps_are_those_of_one_process(call, how):
    call("rank_checks:steps_are_those_of_one_process", how, "native")


def test_steps_of_the_reference_are_those_of_one_process(call_two):
    call_two("rank_checks:steps_are_those_of_one_process", "shard", "reference")


@pytest.mark.two_gpus  # under Triton's interpreter it takes too long
def test_steps_of_triton_are_those_of_one_process():
    check = "rank_checks:steps_are_those_of_one_process"
    ranks.ranks(2, "nccl").call(check, "columns", "triton")


@pytest.mark.parametrize("how", ["shard", "replicate", "columns", "hybrid", "blocks"])
def test_norms_are_of_all_parts(call, how):
    call("rank_checks:norms_are_of_all_parts", how)


@pytest.mark.parametrize(
    "check",
    [
        "states_have_the_shape_of_the_part",
        "steps_neither_wait_nor_talk",
        "plain_groups_count_once",
        "overflows_on_one_rank_skip_the_step_on_all",
        "errors_say_the_way_out",
    ],
)
def test_parts(call, check):
    call(f"rank_checks:{check}")


@pytest.mark.parametrize("check", ["norms_do_not_wait", "gradients_that_are_not_summed_yet_are"])
def test_parts_on_two_ranks(call_two, check):
    call_two(f"rank_checks:{check}")


@pytest.mark.parametrize(
    "check", ["no_gradient_is_stale", "no_state_is_stale", "a_gradient_on_another_mesh_is_refused"]
)
def test_what_is_kept_from_step_to_step(call, check):
    call(f"rank_checks_parts:{check}")


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_random_bits_are_those_of_the_elements(call, state_dtype):
    call("rank_checks:random_bits_are_those_of_the_elements", state_dtype)


@pytest.mark.parametrize("storage", cases.STORAGES, ids=str)
def test_storages_keep_the_parts_as_one_process_would(call_two, storage):
    call_two("rank_checks:storages_keep_the_parts_as_one_process_would", storage.options)


# The engines of torch.


@names
def test_data_parallel_is_one_process(call_two, name):
    call_two("rank_checks_torch:data_parallel_is_one_process", name)


@names
@pytest.mark.parametrize("how", ["even", "mixed", "hybrid"])
def test_fully_sharded_steps_are_those_of_one_process(call_two, name, how):
    call_two("rank_checks_torch:fully_sharded_steps_are_those_of_one_process", name, how)


@pytest.mark.parametrize("how", ["mixed", "hybrid"])
def test_fully_sharded_steps_on_four_ranks(how):
    ranks.ranks(4).call(
        "rank_checks_torch:fully_sharded_steps_are_those_of_one_process", "AdamW", how
    )


@names
def test_tensor_parallel_steps_are_those_of_one_process(call_two, name):
    call_two("rank_checks_torch:tensor_parallel_steps_are_those_of_one_process", name)


@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_two_dimensions_of_sharding_are_one_process(name):
    ranks.ranks(4).call("rank_checks_torch:two_dimensions_of_sharding_are_one_process", name)


@names
def test_zero_redundancy_steps_are_those_of_one_process(call_two, name):
    call_two("rank_checks_torch:zero_redundancy_steps_are_those_of_one_process", name)


@pytest.mark.parametrize("name", [name for name in cases.OPTIMIZERS if name != "LAMB"])
def test_gradients_are_released_in_the_backward_pass(call_two, name):
    call_two("rank_checks_torch:gradients_are_released_in_the_backward_pass", name, False)


@names
@pytest.mark.two_gpus
def test_offloaded_parts_are_those_on_the_gpu(name):
    ranks.ranks(2, "nccl").call("rank_checks_torch:offloaded_parts_are_those_on_the_gpu", name)


@pytest.mark.two_gpus
def test_gradients_on_their_way_to_the_cpu_are_released():
    check = "rank_checks_torch:gradients_are_released_in_the_backward_pass"
    ranks.ranks(2, "nccl").call(check, "AdamW", True)


@pytest.mark.parametrize(
    "check",
    [
        "gradients_that_accumulate_are_one_step",
        "gradients_that_are_averaged_later_are_not_released",
        "no_gradient_is_kept_after_a_step",
        "parameters_notice_that_they_have_changed",
    ],
)
def test_engines(call_two, check):
    call_two(f"rank_checks_torch:{check}")


# Checkpoints.

STORED = [(name, "float32", 3) for name in cases.OPTIMIZERS] + [
    ("SGD", "float32", 0),
    ("AdamW", "float32", 0),
    ("AdamW", "bfloat16", 3),
    ("AdamW", "blocks", 3),
    ("Lion", "blocks", 3),
    ("AdamW", "split", 3),
]


@pytest.mark.parametrize(("name", "storage", "steps"), STORED)
def test_a_checkpoint_of_two_ranks_goes_on_on_any_number(engine, name, storage, steps, tmp_path):
    saved = (str(tmp_path), name, storage, steps)
    ranks.ranks(2, engine).call("rank_checks_checkpoints:save", *saved)
    for size in (1, *SIZES) if engine == "gloo" else (1, 2):
        ranks.ranks(size, engine).call("rank_checks_checkpoints:load", *saved, True)
    if storage != "blocks":
        ranks.ranks(1, engine).call("rank_checks_checkpoints:load", *saved, False)


def test_blocks_of_parts_are_not_taken_for_those_of_a_whole(tmp_path):
    saved = (str(tmp_path), "AdamW", "blocks", 3)
    ranks.ranks(2).call("rank_checks_checkpoints:save", *saved)
    with pytest.raises(ranks.RankError, match=r"Missing key.*exp_avg\.codes"):
        ranks.ranks(1).call("rank_checks_checkpoints:load", *saved, False)


@names
def test_asking_for_a_state_dict_moves_nothing(call_two, name):
    call_two("rank_checks_checkpoints:asking_moves_nothing", name)


@names
def test_whole_state_dicts_go_both_ways(call_two, name):
    call_two("rank_checks_checkpoints:whole_state_dicts_go_both_ways", name)


@names
def test_flat_state_dicts_go_on(call_two, name):
    call_two("rank_checks_checkpoints:flat_state_dicts_go_on", name)


@pytest.mark.parametrize("storage", ["float32", "bfloat16", "blocks", "split"])
@pytest.mark.parametrize(
    "check",
    [
        "state_dicts_of_this_rank_resume",
        "a_checkpoint_of_one_process_is_shared_out",
        "what_a_wrapper_keeps_comes_back",
    ],
)
def test_state_dicts_without_a_framework(call_two, check, storage):
    call_two(f"rank_checks_checkpoints:{check}", storage)


def test_checkpoints_that_do_not_fit_say_the_way_out(call_two):
    call_two("rank_checks_checkpoints:errors_say_the_way_out")


# The page of the documentation.


def test_the_examples_run(engine, tmp_path):
    ranks.call_with_page("rank_page:run_to_the_end", PAGE, tmp_path, engine)


def test_links_of_the_page_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE.read_text()):
        assert target.startswith("https://") or (PAGE.parent / target).exists(), target
