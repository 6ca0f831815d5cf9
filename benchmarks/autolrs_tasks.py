"""Five small training jobs on data that every machine has, for comparing learning-rate methods.

A batch is a dict of tensors that holds all that is random in an update: which examples, how they
are shifted, their noise. So equal seeds mean equal batches, whatever a method does with them.
"""

from __future__ import annotations

import functools
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from gpt_model import GPT, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional as F

import lrs_ext

Batch = dict[str, Tensor]
Draw = Callable[[torch.Generator], Batch]
Split = Literal["validation", "test"]
Kind = Literal["SGD", "Adam", "AdamW"]

# The middle of the range of learning rates that is searched: the optimizer's kind alone decides.
CENTRES: dict[Kind, float] = {"SGD": 0.1, "Adam": 1e-3, "AdamW": 1e-3}
MOMENTUM, WEIGHT_DECAY = 0.9, 0.01  # of SGD; of AdamW, torch's default
EVALUATION_SEEDS = {"validation": 1_000_001, "test": 1_000_002}  # no seed of a run
HELD_OUT_COPIES = 4  # of each held-out digit, differently shifted


@dataclass(frozen=True)
class Task:
    """A training job.

    Attributes:
        name, title: short, and in words.
        kind: the optimizer.
        build: makes the model; weights come from torch's global generator.
        load: returns how to draw a training batch, and the held-out sets as one batch each.
        loss: mean over a batch, a 0-d tensor.
    """

    name: str
    title: str
    kind: Kind
    build: Callable[[], nn.Module]
    load: Callable[[], tuple[Draw, dict[Split, Batch]]]
    loss: Callable[[nn.Module, Batch], Tensor]

    @property
    def centre(self) -> float:
        """The learning rate in the middle of every range that is searched."""
        return CENTRES[self.kind]

    def optimizer(
        self, params: Iterator[nn.Parameter], lr: float | lrs_ext.Schedule
    ) -> torch.optim.Optimizer:
        if self.kind == "SGD":
            return lrs_ext.SGD(params, lr=lr, momentum=MOMENTUM)
        if self.kind == "Adam":
            return lrs_ext.Adam(params, lr=lr)
        return lrs_ext.AdamW(params, lr=lr, weight_decay=WEIGHT_DECAY)

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def batches(self, seed: int) -> Stream:
        return Stream(self.load()[0], seed)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: Split) -> Tensor:
        """Returns the mean loss on a held-out set, 0-d; leaves the model in training mode."""
        model.eval()
        loss = self.loss(model, self.load()[1][split])
        model.train()
        return loss


class Stream:
    """Training batches without end; every iteration starts anew, with the same ones."""

    def __init__(self, draw: Draw, seed: int) -> None:
        self._draw, self._seed = draw, seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self._seed)
        while True:
            yield self._draw(generator)


def held_out(draw: Callable[[Split, torch.Generator], Batch]) -> dict[Split, Batch]:
    """Returns the held-out sets, the same in every process."""
    return {
        split: draw(split, torch.Generator().manual_seed(seed))
        for split, seed in EVALUATION_SEEDS.items()
    }


def integers(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=generator)


# Digits


@functools.cache
def digits() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns pixels in [0, 1], (9 shifts, n, 8, 8), and labels, (n,), by split."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images, labels = {}, {}
    parts = {"train": order[:1197], "validation": order[1197:1497], "test": order[1497:]}
    for split, part in parts.items():
        framed = F.pad(torch.tensor(data.images[part], dtype=torch.float32) / 16, (1, 1, 1, 1))
        shifts = [framed[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
        images[split] = torch.stack(shifts)
        labels[split] = torch.tensor(data.target[part])
    return images, labels


def draw_digits(generator: torch.Generator, split: str, count: int | None) -> tuple[Tensor, Tensor]:
    """Returns shifted images (n, 8, 8) and their labels (n,).

    Args:
        count: how many; None takes every image of the split `HELD_OUT_COPIES` times.
    """
    images, labels = digits()[0][split], digits()[1][split]
    if count is None:
        chosen = torch.arange(len(labels)).repeat(HELD_OUT_COPIES)
    else:
        chosen = integers(generator, len(labels), count)
    return images[integers(generator, len(images), len(chosen)), chosen], labels[chosen]


@functools.cache
def load_noisy_digits() -> tuple[Draw, dict[Split, Batch]]:
    def draw(generator: torch.Generator, split: str = "train", count: int | None = 32) -> Batch:
        images, labels = draw_digits(generator, split, count)
        noise = 0.2 * torch.randn(images.shape, generator=generator)
        return {"images": (images + noise).unsqueeze(1), "labels": labels}

    return draw, held_out(lambda split, generator: draw(generator, split, None))


class ResidualBlock(nn.Module):
    """Pre-activation residual block of one convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(F.relu(self.norm(x)))


def build_cnn(channels: int = 12) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False),
        ResidualBlock(channels),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(channels * 16, 10),
    )


def classification_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["images"]), batch["labels"])


LATENTS = 8


@functools.cache
def load_digits_and_latents() -> tuple[Draw, dict[Split, Batch]]:
    def draw(generator: torch.Generator, split: str = "train", count: int | None = 32) -> Batch:
        images, _ = draw_digits(generator, split, count)
        noise = torch.randn(len(images), LATENTS, generator=generator)
        return {"images": images.flatten(1), "noise": noise}

    return draw, held_out(lambda split, generator: draw(generator, split, None))


class VAE(nn.Module):
    """Variational autoencoder of 64 pixels; maps pixels and noise to logits, mean, log variance."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 2 * LATENTS))
        self.decoder = nn.Sequential(nn.Linear(LATENTS, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=-1)
        return self.decoder(mean + (0.5 * log_variance).exp() * noise), mean, log_variance


def negative_elbo(model: nn.Module, batch: Batch) -> Tensor:
    """Nats an image: Bernoulli reconstruction, Gaussian prior."""
    logits, mean, log_variance = model(batch["images"], batch["noise"])
    misfit = F.binary_cross_entropy_with_logits(logits, batch["images"], reduction="sum")
    divergence = 0.5 * (log_variance.exp() + mean.square() - 1.0 - log_variance).sum()
    return (misfit + divergence) / len(mean)


# Text


@functools.cache
def text() -> dict[str, Tensor]:
    """Returns the top-level modules of the standard library by split, uint8, end to end.

    Whole files are held out: a pure function of their names.
    """
    parts: dict[str, list[bytes]] = {"train": [], "validation": [], "test": []}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        split = {0: "validation", 1: "test"}.get(zlib.crc32(path.name.encode()) % 10, "train")
        parts[split].append(path.read_bytes())
    if not all(parts.values()):
        raise FileNotFoundError(
            "this interpreter's standard library is packed or stripped: use one that has its .py "
            "files"
        )
    return {
        split: torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)
        for split, files in parts.items()
    }


def load_windows(count: int, context: int, held_out_count: int) -> tuple[Draw, dict[Split, Batch]]:
    """Returns batches of `count` windows of `context` bytes and the byte after them."""
    offsets = torch.arange(context + 1)

    def draw(generator: torch.Generator, split: str = "train", count: int = count) -> Batch:
        source = text()[split]
        starts = integers(generator, len(source) - context, count, 1)
        return {"bytes": source[starts + offsets].long()}

    return draw, held_out(lambda split, generator: draw(generator, split, held_out_count))


@functools.cache
def load_gpt_windows() -> tuple[Draw, dict[Split, Batch]]:
    return load_windows(4, 32, held_out_count=192)


@functools.cache
def load_mlp_windows() -> tuple[Draw, dict[Split, Batch]]:
    return load_windows(32, 8, held_out_count=4096)


def build_gpt() -> nn.Module:
    return GPT(layers=1, width=32, context=32)


def build_text_mlp() -> nn.Module:
    """Bengio et al., A Neural Probabilistic Language Model, JMLR 2003, over bytes."""
    return nn.Sequential(
        nn.Embedding(VOCABULARY, 16),
        nn.Flatten(),
        nn.Linear(8 * 16, 128),
        nn.Tanh(),
        nn.Linear(128, VOCABULARY),
    )


def every_byte_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model.loss(batch["bytes"][:, :-1], batch["bytes"][:, 1:])


def last_byte_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["bytes"][:, :-1]), batch["bytes"][:, -1])


# Photographs

PATCH = 8
PHOTO_COLUMNS = {"train": (0, 448), "validation": (448, 544), "test": (544, 640)}


@functools.cache
def photos() -> dict[str, tuple[Tensor, Tensor]]:
    """Returns pixels, flat, and where patches start in them, by split.

    The splits are disjoint ranges of columns of both photographs.
    """
    from sklearn.datasets import load_sample_images

    grey = np.stack([image.mean(-1) for image in load_sample_images().images])
    pixels = torch.tensor((grey - grey.mean()) / grey.std(), dtype=torch.float32)
    positions = torch.arange(pixels.numel()).view(pixels.shape)
    return {
        split: (pixels.flatten(), positions[:, : 1 - PATCH, start : stop - PATCH + 1].flatten())
        for split, (start, stop) in PHOTO_COLUMNS.items()
    }


@functools.cache
def load_patches() -> tuple[Draw, dict[Split, Batch]]:
    inside = (640 * torch.arange(PATCH).unsqueeze(1) + torch.arange(PATCH)).flatten()

    def draw(generator: torch.Generator, split: str = "train", count: int = 64) -> Batch:
        pixels, starts = photos()[split]
        clean = pixels[starts[integers(generator, len(starts), count, 1)] + inside]
        noise = torch.randn(clean.shape, generator=generator)
        return {"clean": clean, "noisy": clean + 0.5 * noise}

    return draw, held_out(lambda split, generator: draw(generator, split, 4096))


def build_denoiser() -> nn.Module:
    pixels, width = PATCH * PATCH, 128
    return nn.Sequential(
        nn.Linear(pixels, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, pixels),
    )


def denoising_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["noisy"]), batch["clean"])


TASKS = {
    task.name: task
    for task in (
        Task(
            "digits",
            "digits, noisy: residual CNN with BatchNorm, SGD with momentum",
            "SGD",
            build_cnn,
            load_noisy_digits,
            classification_loss,
        ),
        Task(
            "vae",
            "digits: variational autoencoder, Adam",
            "Adam",
            VAE,
            load_digits_and_latents,
            negative_elbo,
        ),
        Task(
            "gpt",
            "source text: byte transformer, AdamW",
            "AdamW",
            build_gpt,
            load_gpt_windows,
            every_byte_loss,
        ),
        Task(
            "text",
            "source text: MLP over the last 8 bytes, AdamW",
            "AdamW",
            build_text_mlp,
            load_mlp_windows,
            last_byte_loss,
        ),
        Task(
            "photos",
            "photographs: MLP that denoises 8 x 8 patches, SGD with momentum",
            "SGD",
            build_denoiser,
            load_patches,
            denoising_loss,
        ),
    )
}
