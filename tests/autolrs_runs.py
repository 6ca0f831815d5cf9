"""A small training run for the tests of AutoLRS: everything random, everything checkable."""

import math
import random

import numpy as np
import torch
from torch import nn

import lrs_ext

BOUNDS = (1e-4, 1e1)
# 8 trials of 8 updates, 86 of training.
PEAK = {"total_steps": 150, "num_trials": 8, "trial_steps": 8}
PAPER = {
    "preset": "paper",
    "total_steps": 170,
    "num_trials": 5,
    "stage_steps": (20, 40),
    "trial_steps": 10,
}
PRESETS = {"peak": PEAK, "paper": PAPER}


class Augmented(torch.utils.data.Dataset):
    """Points of a noisy line, moved at random by each of the generators that loaders use."""

    def __init__(self, size=64):
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(size, 4, generator=generator)
        self.targets = self.inputs.sum(1, keepdim=True)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        noise = 0.1 * torch.randn(4) + 0.1 * random.random() + 0.1 * float(np.random.rand())  # noqa: NPY002
        return self.inputs[index] + noise, self.targets[index]


def set_seeds(seed):
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what loaders draw from


def make_loader():
    return torch.utils.data.DataLoader(Augmented(), batch_size=8, shuffle=True)


def list_of_batches():
    """What draws no random numbers."""
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator))
        for _ in range(7)
    ]


def make_model():
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)
    )


OPTIMIZERS = {
    "sgd": lambda params: lrs_ext.SGD(params, lr=1e-3, momentum=0.9, dampening=0.1),
    "adamw": lambda params: lrs_ext.AdamW(params, lr=1e-3),
    "lion": lambda params: lrs_ext.Lion(params, lr=1e-3),
    "lamb": lambda params: lrs_ext.LAMB(params, lr=1e-3),
    "torch sgd": lambda params: torch.optim.SGD(params, lr=1e-3, momentum=0.9, dampening=0.1),
    "torch adam": lambda params: torch.optim.Adam(params, lr=1e-3),
    "torch adamw fused": lambda params: torch.optim.AdamW(params, lr=1e-3, fused=True),
    "torch rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
}


class Training:
    """Model, optimizer, controller and loader, with a checkpoint of all of them.

    Args:
        wrap: what the model is put into; then every `rank` draws random numbers of its own.
    """

    def __init__(
        self,
        optimizer="adamw",
        seed=0,
        bounds=BOUNDS,
        loader=None,
        wrap=None,
        rank=0,
        **options,
    ):
        set_seeds(seed)
        self.model = make_model()
        if wrap is not None:
            self.model = wrap(self.model)
            set_seeds(seed + rank)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.auto = lrs_ext.AutoLRS(self.optimizer, self.model, bounds, **(PEAK | options))
        self.losses, self.batches = [], []
        self.stream = self.auto.batches(loader or make_loader())

    def update(self):
        batch = next(self.stream)
        loss = nn.functional.mse_loss(self.model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.auto.step(loss.detach())
        self.losses.append(loss.detach())
        self.batches.append(batch)

    def run(self, updates=math.inf):
        while not self.auto.done and updates > 0:
            self.update()
            updates -= 1
        return self

    def break_weights(self):
        """Does what a diverging update does."""
        with torch.no_grad():
            self.model[0].weight.fill_(math.nan)

    def weights(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])

    def state_dict(self):
        parts = ("model", "optimizer", "auto")
        return {name: getattr(self, name).state_dict() for name in parts}

    def load_state_dict(self, state, order=("model", "optimizer", "auto")):
        for name in order:
            getattr(self, name).load_state_dict(state[name])
        self.stream = self.auto.batches(make_loader())
        return self
