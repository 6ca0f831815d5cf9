"""Text for the main job: the source of the interpreter's own standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Not part of the library proper, absent on some systems, or (encodings) near-identical tables
# that would leak from training into validation.
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})
ONE_FILE_IN = 10


@dataclass(frozen=True)
class Corpus:
    """Two disjoint sets of files and their text, uint8, end to end."""

    train_files: tuple[str, ...]
    validation_files: tuple[str, ...]
    train: Tensor
    validation: Tensor

    @cached_property
    def digest(self) -> str:
        """A short fingerprint of the text: a resumed run must read the same bytes."""
        sha = hashlib.sha256(self.train.numpy().tobytes())
        sha.update(self.validation.numpy().tobytes())
        return sha.hexdigest()[:16]


def is_validation(name: str) -> bool:
    """Whether a file is held out: a pure function of its path, so every run holds out the same."""
    return zlib.crc32(name.encode()) % ONE_FILE_IN == 0


def load_corpus(root: Path | None = None) -> Corpus:
    """Read every distinct ``.py`` file under ``root`` (default: the standard library)."""
    root = root or Path(sysconfig.get_path("stdlib"))
    files: dict[bool, list[str]] = {False: [], True: []}
    texts: dict[bool, list[bytes]] = {False: [], True: []}
    seen: set[bytes] = set()
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    for name in sorted(n.as_posix() for n in names if SKIPPED.isdisjoint(n.parts)):
        text = (root / name).read_bytes()
        if text and text not in seen:
            seen.add(text)
            files[is_validation(name)].append(name)
            texts[is_validation(name)].append(text)
    if not files[False] or not files[True]:
        raise FileNotFoundError(
            f"too few Python files to train on under {root}: this interpreter's standard library"
            " is packed or stripped; use one that has its .py files"
        )
    train, validation = (
        torch.frombuffer(bytearray(b"".join(texts[held_out])), dtype=torch.uint8)
        for held_out in (False, True)
    )
    return Corpus(tuple(files[False]), tuple(files[True]), train, validation)


def windows(text: Tensor, offsets: np.ndarray, context: int) -> tuple[Tensor, Tensor]:
    """The bytes at ``offsets`` (n,) and their successors: int64 (n, context) each."""
    starts = torch.from_numpy(offsets)
    if text.is_cuda:
        starts = starts.pin_memory().to(text.device, non_blocking=True)
    positions = starts[:, None] + torch.arange(context + 1, device=text.device)
    tokens = text[positions].long()
    return tokens[:, :-1], tokens[:, 1:]


def sample_batch(
    text: Tensor, *, seed: int, step: int, batch_size: int, context: int
) -> tuple[Tensor, Tensor]:
    """Batch number ``step``: a pure function of (seed, step), so resuming needs no loader state."""
    generator = np.random.default_rng((seed, step))
    offsets = generator.integers(0, text.numel() - context, size=batch_size)
    return windows(text, offsets, context)


def validation_batches(
    text: Tensor, *, batches: int, batch_size: int, context: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same windows every time, spread evenly over ``text``."""
    offsets = np.linspace(0, text.numel() - context - 1, batches * batch_size).astype(np.int64)
    for part in np.split(offsets, batches):
        yield windows(text, part, context)
