"""A training job that checkpoints and resumes, to be killed at any point."""

import os
import sys
from pathlib import Path

import torch
from autolrs_runs import PRESETS, Training

EVERY = 3  # updates between checkpoints


def main(folder, preset):
    torch.set_num_threads(1)
    checkpoint, unfinished = folder / "checkpoint.pt", folder / "unfinished.pt"
    run = Training("sgd", **PRESETS[preset])
    updates = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        run.load_state_dict(saved["run"])
        updates = saved["updates"]
    while not run.auto.done:
        run.update()
        updates += 1
        if updates % EVERY == 0:
            torch.save({"run": run.state_dict(), "updates": updates}, unfinished)
            os.replace(unfinished, checkpoint)
            print(updates, flush=True)
    torch.save({"weights": run.weights(), "rates": run.auto.history.learning_rates.tolist()},
               folder / "end.pt")  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
