"""A tiny regression job that every framework trains: data without chance, a model with some."""

import torch
from torch import nn

import lrs_ext

STEPS = 40
REX = lrs_ext.rex(1e-2, total_steps=STEPS, warmup_steps=4)
RATES = [REX(k) for k in range(STEPS)]
BOUNDS = (1e-4, 1.0)
SEARCH = {"num_trials": 4, "trial_steps": 4}  # updates 0 to 15 of 40

_GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(96, 4, generator=_GENERATOR)
TARGETS = INPUTS.sum(1, keepdim=True)
POINTS = torch.utils.data.TensorDataset(INPUTS, TARGETS)


def make_net(dropout=0.1):
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 1))


def mse(net, batch):
    return nn.functional.mse_loss(net(batch[0]), batch[1])


def weights(module):
    return torch.cat([param.detach().flatten() for param in module.parameters()])


def same_search(first, second):
    """Whether two runs of AutoLRS have tried, seen and chosen the same, to the bit."""
    a, b = first.history, second.history
    return (
        a.losses.tolist() == b.losses.tolist()
        and a.learning_rates.tolist() == b.learning_rates.tolist()
        and [stage.best_lr for stage in a.stages] == [stage.best_lr for stage in b.stages]
    )
