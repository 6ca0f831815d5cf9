"""A training job that checkpoints and resumes, to be killed at any point, also on several ranks.

A checkpoint is a file of each rank; it is whole when the file `last` has its number of updates.
"""

import datetime
import os
import signal
import sys
from pathlib import Path

import torch
from autolrs_runs import PRESETS, Training
from torch.distributed import barrier, init_process_group
from torch.nn.parallel import DistributedDataParallel

from lrs_ext.autolrs import snapshot

EVERY = 3  # updates between checkpoints
TIMEOUT = datetime.timedelta(seconds=60)


class Death:
    """Where the process kills itself: "save", "trial", "restore" or "load", the n-th time."""

    def __init__(self, point, count):
        self.point, self.left = point, count
        if point == "restore":
            snapshot._copy_all = self._half(snapshot._copy_all)

    def reach(self, point):
        """Comes back unless the time has come."""
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _half(self, copy_all):
        """Dies with half of the tensors copied."""

        def copy(pairs):
            pairs = list(pairs)
            copy_all(pairs[: len(pairs) // 2])
            self.reach("restore")
            copy_all(pairs[len(pairs) // 2 :])

        return copy


def main(folder, preset, death, options):
    torch.set_num_threads(1)
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        store = f"file://{folder}/store-{os.environ['ATTEMPT']}"
        init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
    wrap = DistributedDataParallel if size > 1 else None
    run = Training("sgd", wrap=wrap, rank=rank, **PRESETS[preset], **options)
    updates, last = 0, folder / "last"
    if last.exists():
        updates = int(last.read_text())
        saved = torch.load(folder / f"{updates}-{rank}.pt", weights_only=True)
        death.reach("load")
        run.load_state_dict(saved)
    while not run.auto.done:
        run.update()
        updates += 1
        if run.auto.phase == "search":
            death.reach("trial")
        if updates % EVERY == 0:
            save(run, folder, updates, rank, size, death)
    result = {"weights": run.weights(), "rates": run.auto.history.learning_rates.tolist()}
    torch.save(result, folder / f"end-{rank}.pt")


def save(run, folder, updates, rank, size, death):
    path = folder / f"{updates}-{rank}.pt"
    torch.save(run.state_dict(), path)
    if death.point == "save" and death.left == 1:
        os.truncate(path, path.stat().st_size // 2)
    death.reach("save")
    if size > 1:
        barrier()
    if rank == 0:
        unfinished = folder / "unfinished"
        unfinished.write_text(str(updates))
        os.replace(unfinished, folder / "last")
        print(updates, flush=True)


if __name__ == "__main__":
    folder, preset, point, count, *flags = sys.argv[1:]
    main(Path(folder), preset, Death(point, int(count)), {"parallel_trials": "parallel" in flags})
