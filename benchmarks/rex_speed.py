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

SIZES = (1, 4, 16, 65)  # the last is that of a first tuning job
MODEL_UPDATES, ROUNDS = 130, 3


def measure() -> list[dict[str, Any]]:
    """Returns a row a setting: updates per second of processor time, by the size of a stack.

    The size 0 stands for a plain loop over one module. Ways take turns; the best round counts, as
    other load only ever slows down.
    """
    torch.set_num_threads(1)  # as in the worker processes
    rows = []
    for setting in SETTINGS.values():
        ways: dict[int, Callable[[int], None]] = {0: lambda steps, s=setting: plain_loop(s, steps)}
        for size in SIZES:
            ways[size] = lambda steps, s=setting, n=size: train_stack(s, n, steps)
        best = dict.fromkeys(ways, 0.0)
        for _, (size, way) in itertools.product(range(ROUNDS), ways.items()):
            steps = max(4, MODEL_UPDATES // max(size, 1))
            way(1)
            start = time.process_time()
            way(steps)
            rate = steps * max(size, 1) / (time.process_time() - start)
            best[size] = max(best[size], rate)
        rows.append({"setting": setting.name, "rates": {str(k): round(v) for k, v in best.items()}})
    return rows


def plain_loop(setting: Setting, steps: int) -> None:
    task = setting.task
    model = task.model(0)
    optimizer = task.optimizer(model.parameters(), lrs_ext.rex(setting.centre, max(steps, 2)))
    for batch in itertools.islice(task.batches(0), steps):
        loss = task.loss(model, batch)
        loss.backward()
        if setting.max_norm is not None:
            lrs_ext.clip_grad_norm_(optimizer, setting.max_norm)
        optimizer.step()
        optimizer.zero_grad()


def train_stack(setting: Setting, size: int, steps: int) -> None:
    Stack(setting, 0, [Run("REX", 0)] * size, steps).train()
