"""A training job that checkpoints and resumes, to be killed at any point, also on several ranks.

A checkpoint is a file of each rank; it is whole when the file `last` has its number of updates.
As a program, this forks a process for each job that it reads of, so that none has to import torch.
"""

import datetime
import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # as the first update of an optimizer does, in a second
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


def run(folder, preset, rank, size, attempt, death, options):
    folder, death, wrap = Path(folder), Death(*death), None
    if size > 1:
        store = f"file://{folder}/store-{attempt}"
        init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=TIMEOUT)
        wrap = DistributedDataParallel
    training = Training("sgd", wrap=wrap, rank=rank, **PRESETS[preset], **options)
    updates, last = 0, folder / "last"
    if last.exists():
        updates = int(last.read_text())
        saved = torch.load(folder / f"{updates}-{rank}.pt", weights_only=True)
        death.reach("load")
        training.load_state_dict(saved)
        # Trials at once begin again, and their updates are made a second time.
        updates = training.auto.metrics()["autolrs/updates"]
    while not training.auto.done:
        training.update()
        updates = int(training.auto.metrics()["autolrs/updates"])
        if training.auto.phase == "search":
            death.reach("trial")
        if updates % EVERY == 0:
            save(training, folder, updates, rank, size, death)
    result = {
        "weights": training.weights(),
        "rates": training.auto.history.learning_rates.tolist(),
    }
    torch.save(result, folder / f"end-{rank}.pt")


def save(training, folder, updates, rank, size, death):
    # Under another name than that of the last whole one, which may have as many updates.
    path = folder / f"unfinished-{rank}"
    torch.save(training.state_dict(), path)
    if death.point == "save" and death.left == 1:
        os.truncate(path, path.stat().st_size // 2)
    death.reach("save")
    os.replace(path, folder / f"{updates}-{rank}.pt")
    if size > 1:
        barrier()
    if rank == 0:
        unfinished = folder / "unfinished"
        unfinished.write_text(str(updates))
        os.replace(unfinished, folder / "last")


def serve():
    """Forks a process for each job, and answers with its number and with how it has ended."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        child = os.fork()
        if child == 0:
            become(request["errors"], request["job"])
        print(child, flush=True)


def become(errors, job):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    faulthandler.enable()
    try:
        run(**job)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    serve()
