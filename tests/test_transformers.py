"""Hugging Face's Trainer: schedules stay in charge, runs resume to the bit, AutoLRS searches."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from framework_jobs import BOUNDS, INPUTS, RATES, REX, SEARCH, STEPS, TARGETS, make_net, same_search
from framework_jobs import weights as weights_of
from torch import nn

import lrs_ext
from lrs_ext.integrations import OwnSchedule

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("accelerate", reason="accelerate is not installed: lrs_ext[transformers]")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed: lrs_ext[transformers]"
)

from lrs_ext.integrations.transformers import AutoLRSCallback, ScheduleMixin, Trainer  # noqa: E402

ROWS = [{"x": x, "labels": y} for x, y in zip(INPUTS, TARGETS, strict=True)]


class Regression(nn.Module):
    """Answers as models of transformers do, and remembers what it was asked in training."""

    def __init__(self):
        super().__init__()
        self.net = make_net()
        self.seen = []

    def forward(self, x, labels):
        if self.training:
            self.seen.append(x.clone())
        logits = self.net(x)
        return {"loss": nn.functional.mse_loss(logits, labels), "logits": logits}


@pytest.fixture
def train(tmp_path):
    """Trains in a folder of its own and returns the Trainer."""
    runs = iter(range(100))

    def train(
        lr=REX,
        how="optimizer_cls_and_kwargs",
        callback=None,
        cls=Trainer,
        resume=None,
        optimizer=lrs_ext.AdamW,
        data_collator=None,
        **options,
    ):
        torch.manual_seed(0)
        model = Regression()
        args = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(next(runs))),
            **{"max_steps": STEPS, "save_strategy": "no", "seed": 1} | options,
            per_device_train_batch_size=4,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        if how == "optimizer_cls_and_kwargs":
            given = {how: (optimizer, {"lr": lr})}
        else:
            opt = optimizer(model.parameters(), lr=lr)
            given = {"optimizers": (opt, OwnSchedule(opt) if how == "both" else None)}
        trainer = cls(
            model=model,
            args=args,
            train_dataset=ROWS,
            eval_dataset=ROWS[:8],
            callbacks=[callback] if callback else None,
            data_collator=data_collator,
            **given,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return train


def logged(trainer, key="learning_rate"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def checkpoint(trainer, step):
    return f"{trainer.args.output_dir}/checkpoint-{step}"


# Schedules.


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("how", ["optimizer_cls_and_kwargs", "optimizer alone", "both"])
def test_logged_learning_rates_are_those_of_the_schedule(train, how, accumulation):
    trainer = train(how=how, gradient_accumulation_steps=accumulation)
    assert logged(trainer) == RATES
    assert {type(lr) for lr in logged(trainer)} == {float}
    optimizer = trainer.optimizer.optimizer
    assert optimizer.schedule_buffer.step.item() == STEPS
    assert optimizer.current_lr() == [pytest.approx(REX(STEPS))] * len(optimizer.param_groups)


def test_a_plain_trainer_takes_optimizer_and_schedule(train):
    trainer = train(how="both", cls=transformers.Trainer)
    assert logged(trainer) == RATES


def test_a_plain_trainer_without_a_scheduler_puts_its_own_in_charge(train):
    trainer = train(how="optimizer alone", cls=transformers.Trainer)
    assert logged(trainer)[1] != RATES[1]


def test_other_optimizers_are_left_to_the_trainer(train):
    trainer = train(1e-2, optimizer=torch.optim.AdamW, lr_scheduler_type="constant")
    assert logged(trainer) == [1e-2] * STEPS
    trainer = train(1e-2, how="optimizer alone", optimizer=torch.optim.AdamW)
    assert logged(trainer)[-1] == pytest.approx(1e-2 / STEPS)


def test_a_number_is_left_to_the_trainer_too(train):
    """As of an optimizer of torch; there is no schedule to keep."""
    for options in ({"lr_scheduler_type": "cosine"}, {"how": "optimizer alone"}):
        rates = logged(train(1e-2, **options))
        assert rates == logged(train(1e-2, optimizer=torch.optim.AdamW, **options))
        assert len(set(rates)) == STEPS


def test_whatever_drives_the_optimizer_stays_in_charge(train):
    class Driven(lrs_ext.AdamW):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.plateau = lrs_ext.ReduceOnPlateau(self, factor=0.5, patience=0)

    trainer = train(1e-2, how="optimizer alone", optimizer=Driven)
    assert logged(trainer) == [1e-2] * STEPS


def test_the_scheduler_for_other_optimizers_shows_the_same_rates(train):
    class WithREX(transformers.Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = lrs_ext.ScheduleLR(optimizer or self.optimizer, REX)
            return self.lr_scheduler

    assert logged(train(REX.lr, optimizer=torch.optim.AdamW, cls=WithREX)) == RATES


@pytest.mark.parametrize("how", ["optimizer_cls_and_kwargs", "both"])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_run_resumes_to_the_bit(train, how, name):
    cls = getattr(lrs_ext, name)
    whole = train(how=how, optimizer=cls, save_strategy="steps", save_steps=10)
    resumed = train(how=how, optimizer=cls, resume=checkpoint(whole, 10))
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert logged(resumed) == RATES
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(f"{checkpoint(whole, 10)}/{name}", weights_only=True)


# AutoLRS.


def search(**options):
    return AutoLRSCallback(BOUNDS, **SEARCH | options)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_search_sees_the_losses_and_its_batches_again(train, accumulation):
    callback = search()
    trainer = train(1e-3, callback=callback, gradient_accumulation_steps=accumulation)
    auto = callback.auto
    assert trainer.state.global_step == STEPS == auto.total_steps
    assert auto.done
    assert auto.history.losses.tolist() == pytest.approx(logged(trainer, "loss"), rel=1e-6)
    trials = auto.history.stages[0].trials
    assert len(trials) == 4
    seen = torch.stack(trainer.model.seen).reshape(STEPS, accumulation, -1)
    first = seen[:4]
    for trial in trials:
        assert torch.equal(seen[trial.start : trial.start + 4], first)
        assert trial.losses[0] == trials[0].losses[0]  # the same weights, batch and dropout
    assert torch.equal(seen[16:20], first)  # training begins with them
    assert not any(torch.equal(seen[20], batch) for batch in first)


def test_logs_have_the_numbers_of_the_search(train):
    callback = search()
    trainer = train(1e-3, callback=callback)
    assert logged(trainer, "autolrs/searching") == [1.0] * 15 + [0.0] * 25
    assert {type(value) for value in logged(trainer, "autolrs/lr")} == {float}
    best = callback.auto.history.stages[0].best_lr
    assert logged(trainer, "autolrs/best_lr")[-1] == pytest.approx(best)
    used = callback.auto.history.learning_rates.tolist()
    assert logged(trainer)[1:] == pytest.approx(used[1:], rel=1e-6)  # on a CPU nothing comes late


@pytest.mark.parametrize(("step", "accumulation"), [(6, 2), (16, 1), (30, 1)])
def test_a_search_resumes_to_the_bit(train, step, accumulation):
    options = {"gradient_accumulation_steps": accumulation}
    callbacks = search(), search()
    whole = train(1e-3, callback=callbacks[0], save_strategy="steps", save_steps=step, **options)
    resumed = train(1e-3, callback=callbacks[1], resume=checkpoint(whole, step), **options)
    assert torch.equal(weights_of(resumed.model), weights_of(whole.model))
    assert same_search(callbacks[0].auto, callbacks[1].auto)


def test_evaluation_in_mid_trial_changes_nothing(train):
    callbacks = search(), search()
    train(1e-3, callback=callbacks[0])
    train(1e-3, callback=callbacks[1], eval_strategy="steps", eval_steps=3)
    first, second = (callback.auto.history for callback in callbacks)
    assert first.losses[:16].tolist() == second.losses[:16].tolist()
    assert first.stages[0].best_lr == second.stages[0].best_lr


def test_batches_of_a_class_of_their_own_can_be_saved(train):
    def collate(rows):
        batch = transformers.default_data_collator(rows)
        return transformers.BatchEncoding(batch)

    callbacks = search(), search()
    whole = train(
        1e-3, callback=callbacks[0], data_collator=collate, save_strategy="steps", save_steps=6
    )
    train(1e-3, callback=callbacks[1], data_collator=collate, resume=checkpoint(whole, 6))
    assert same_search(callbacks[0].auto, callbacks[1].auto)


def test_an_epoch_that_has_run_dry_takes_no_batch_of_a_trial(train):
    # In a resumed epoch, transformers 5.0 asks for batches behind its end, too.
    class Eager(Trainer):
        asked = 0

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            Eager.asked += 1
            if Eager.asked % 3 == 0:
                assert super().get_batch_samples(iter(()), num_batches, device)[0] == []
            return super().get_batch_samples(epoch_iterator, num_batches, device)

    callbacks = search(), search()
    train(1e-3, callback=callbacks[0])
    train(1e-3, callback=callbacks[1], cls=Eager)
    assert same_search(callbacks[0].auto, callbacks[1].auto)


def test_a_new_optimizer_is_searched_anew(train):
    callback = search()
    trainer = train(1e-3, callback=callback)
    first = weakref.ref(callback.auto)
    trainer.optimizer = None  # the Trainer makes another
    trainer.train()
    assert first() is None
    assert callback.auto.done
    assert logged(trainer, "autolrs/updates")[-1] == STEPS


def test_what_cannot_work_says_so(train):
    with pytest.raises(TypeError, match="total_steps is the max_steps"):
        search(total_steps=100)
    with pytest.raises(RuntimeError, match=r"before trainer.train\(\) has begun"):
        search().auto  # noqa: B018
    with pytest.raises(RuntimeError, match=r"needs the Trainer of lrs_ext\.integrations"):
        train(1e-3, callback=search(), how="both", cls=transformers.Trainer)
    with pytest.raises(RuntimeError, match=r"needs an optimizer of lrs_ext,.* got AdamW"):
        train(1e-3, callback=search(), optimizer=torch.optim.AdamW)
    with pytest.raises(ValueError, match="is a schedule or a tensor"):
        train(REX, callback=search())

    class Scheduled(ScheduleMixin, transformers.Trainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = lrs_ext.ScheduleLR(self.optimizer, [REX, REX])
            return super().create_scheduler(num_training_steps, optimizer)

    with pytest.raises(RuntimeError, match="ScheduleLR would write over the learning rates"):
        train(1e-3, callback=search(), cls=Scheduled)


def test_a_checkpoint_without_a_search_is_refused(train):
    whole = train(1e-3, save_strategy="steps", save_steps=10)
    with pytest.raises(ValueError, match="has no state of AutoLRS"):
        train(1e-3, callback=search(), resume=checkpoint(whole, 10))


HIDDEN = """
import sys
for module, missing in {missing}.items():
    sys.modules.update(dict.fromkeys(missing))
    try:
        __import__(f"lrs_ext.integrations.{{module}}")
    except ImportError as error:
        print(error)
"""


def test_a_missing_library_names_the_extra():
    missing = {"transformers": ["transformers"], "lightning": ["lightning", "pytorch_lightning"]}
    run = [sys.executable, "-c", HIDDEN.format(missing=missing)]
    printed = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == 2
    for line, extra in zip(printed, missing, strict=True):
        assert line.endswith(f"pip install 'lrs_ext[{extra}]'")
