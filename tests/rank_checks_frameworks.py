"""Checks of Accelerate and the Hugging Face Trainer on several ranks; see test_framework_ranks.py.

Accelerate takes FSDP for one of the ways to use several accelerators. Where it finds CPUs only, it
leaves its plugin alone and says nothing (its state.py, `AcceleratorState.__init__`): parameters are
then averaged by DistributedDataParallel. Nothing else of it minds. So the checks put what it found
right, and everything after that is its own.
"""

import contextlib
import os
from unittest import mock

import accelerate
import rank_jobs
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from framework_jobs import BOUNDS, SEARCH
from rank_jobs import RANK
from torch.distributed.tensor import DTensor

import lrs_ext
from lrs_ext.integrations.transformers import AutoLRSCallback, Trainer

# Accelerate asks for them, and then takes the process group that is there.
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

STEPS = 6
REX = lrs_ext.rex(1e-2, total_steps=STEPS, warmup_steps=2)


def fsdp_also_on_cpus():
    """While it is in force, Accelerate knows of FSDP on CPUs, too; on GPUs it does anyway."""
    if not is_on_cpus():
        return contextlib.nullcontext()

    def init(self, *args, fsdp_plugin=None, **options):
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if "fsdp_plugin" in self.__dict__:
            self.distributed_type = DistributedType.FSDP

    original = AcceleratorState.__init__
    return mock.patch.object(AcceleratorState, "__init__", init)


def is_on_cpus():
    return rank_jobs.device == "cpu"


def parts_of(model):
    assert all(isinstance(param, DTensor) for param in model.parameters())
    return [param.to_local().detach().clone() for param in model.parameters()]


def assert_same(parts, others):
    assert len(parts) == len(others) > 0
    assert all(map(torch.equal, parts, others))


def plugin_is_left_alone_on_cpus():
    """What the documentation says of Accelerate as it is."""
    AcceleratorState._reset_state(reset_partial_state=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    model = torch.nn.Linear(4, 4)
    optimizer = lrs_ext.AdamW(model.parameters(), lr=REX)
    model, _ = accelerator.prepare(model, optimizer)
    return type(model).__name__


class Prepared:
    """A job that `Accelerator.prepare` has sharded, after the optimizer was made."""

    def __init__(self, lr=REX):
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=20
        )
        self.accelerator = accelerate.Accelerator(cpu=is_on_cpus(), fsdp_plugin=plugin)
        torch.manual_seed(0)
        layers = [torch.nn.Linear(10, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)]
        model = torch.nn.Sequential(*layers)
        optimizer = lrs_ext.AdamW(model.parameters(), lr=lr, weight_decay=lrs_ext.linear(0.3, 8))
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def update(self, steps):
        for step in steps:
            batch = rank_jobs.random((4, 10), 10 * step + RANK)
            self.accelerator.backward(self.model(batch).square().mean())
            lrs_ext.clip_grad_norm_(self.optimizer, 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self


def prepared_runs_go_on(folder):
    with fsdp_also_on_cpus():
        run = Prepared().update(range(3))
        assert run.accelerator.is_fsdp2
        run.accelerator.save_state(folder)
        run.update(range(3, 5))
        other = Prepared(lr=0.7)
        other.accelerator.load_state(folder)
        inner = other.optimizer.optimizer
        assert int(inner.schedule_buffer.step) == 3
        assert inner.current_lr() == [torch.tensor(REX(3)).item()]
        assert inner.param_groups[0]["weight_decay"] == lrs_ext.linear(0.3, 8)(3)
        assert_same(parts_of(other.update(range(3, 5)).model), parts_of(run.model))


def trainer(folder, steps=STEPS, lr=REX, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=16, n_positions=8, vocab_size=32, tie_word_embeddings=False
    )
    tokens = torch.randint(32, (64, 8), generator=torch.Generator().manual_seed(0))
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        use_cpu=is_on_cpus(),
        disable_tqdm=True,
        fsdp="full_shard",
        fsdp_config={
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["GPT2Block"],
        },
    )
    return Trainer(
        model=transformers.GPT2LMHeadModel(config),
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        optimizer_cls_and_kwargs=(lrs_ext.AdamW, {"lr": lr}),
        **options,
    )


def logged(run, name):
    return [entry[name] for entry in run.state.log_history if name in entry]


def trainers_go_on(folder):
    with fsdp_also_on_cpus():
        run = trainer(folder)
        run.train()
        assert run.accelerator.is_fsdp2
        assert logged(run, "learning_rate") == [REX(step) for step in range(STEPS)]
        resumed = trainer(folder)
        resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
        assert logged(resumed, "learning_rate") == [REX(step) for step in range(STEPS)]
        assert_same(parts_of(resumed.model), parts_of(run.model))
    return logged(run, "loss")


def trainers_search(folder):
    """AutoLRS in a Trainer that shards; returns what it has found."""
    with fsdp_also_on_cpus():
        search = AutoLRSCallback(BOUNDS, **SEARCH)
        run = trainer(folder, steps=40, lr=1e-3, callbacks=[search])
        run.train()
        assert run.accelerator.is_fsdp2
        parts_of(run.model)
    history = search.auto.history
    assert search.auto.done
    (stage,) = history.stages
    assert len({trial.losses[0] for trial in stage.trials}) == 1  # rolled back, the same batches
    return history.learning_rates.tolist(), history.losses.tolist(), stage.best_lr
