"""How many updates a second of one core: stacks of models against single models, one a process."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from rex_settings import SETTINGS, Setting
from rex_stack import Run, Stack

import lrs_ext

SIZES = (1, 4, 12, 65)  # the last two are those of most tests and of a first tuning
MODEL_UPDATES, ROUNDS = 130, 3


def measure() -> list[dict[str, Any]]:
    """Returns a row a setting: updates per second of processor time, by the size of a stack.

    The size 0 stands for a plain loop over one module. Ways take turns; the best round counts, as
    other load only ever slows down.
    """
    torch.set_num_threads(1)  # as in the worker processes
    rows = []
    for setting in SETTINGS.values():
        best = dict.fromkeys((0, *SIZES), 0.0)
        for _, size in itertools.product(range(ROUNDS), best):
            steps = max(4, MODEL_UPDATES // max(size, 1))
            trainer(setting, size, 1)()  # warms up
            train = trainer(setting, size, steps)
            start = time.process_time()
            train()
            rate = steps * max(size, 1) / (time.process_time() - start)
            best[size] = max(best[size], rate)
        rows.append({"setting": setting.name, "rates": {str(k): round(v) for k, v in best.items()}})
    return rows


def trainer(setting: Setting, size: int, steps: int) -> Callable[[], None]:
    """Returns a function that trains, all else done before."""
    if size > 0:
        return Stack(setting, 0, [Run("REX", 0)] * size, steps).train
    model = setting.task.model(0)
    optimizer = setting.task.optimizer(model.parameters(), lrs_ext.rex(setting.centre, steps))

    def train() -> None:
        for batch in itertools.islice(setting.task.batches(0), steps):
            loss = setting.task.loss(model, batch)
            loss.backward()
            if setting.max_norm is not None:
                lrs_ext.clip_grad_norm_(optimizer, setting.max_norm)
            optimizer.step()
            optimizer.zero_grad()

    return train
