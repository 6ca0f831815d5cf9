"""Checkpoints of the main job: one file, written whole or not at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from gpt_config import JobError

FORMAT = "lrs_ext train_gpt 2"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write beside ``path``, then rename: a reader sees the old file or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read plain numbers, strings and tensors, onto the CPU; no code in the file is run."""
    if not path.is_file():
        raise JobError(f"no checkpoint at {path}: give --resume the .pt file of a stopped run")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise JobError(
            f"{path} is not a readable checkpoint: {str(error) or 'it is empty'}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise JobError(f"{path} is not a checkpoint of this job (expected format {FORMAT!r})")
    return content
