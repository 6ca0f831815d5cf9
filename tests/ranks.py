"""Several ranks for tests: processes that wait for calls, so that many checks share a start.

A call goes to every rank and comes back when all have answered. A rank that raises, dies or hangs
fails the call with that rank's traceback; the processes are then ended, and the next call starts
others.
"""

import multiprocessing
import os
import signal
import socket
import tempfile
import time
from multiprocessing import connection
from pathlib import Path

import rank_worker
from cases import HAS_GPU

# Ranks are forked from a process that has imported what takes them seconds. Not where there are
# GPUs, whose driver a fork may break. What reads its rank when it is imported must not be here.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    []
    if HAS_GPU
    else [
        "pytest",
        "torch._dynamo",
        "torch.distributed._functional_collectives",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.parallel",
        "torch.nn.parallel",
    ]
)
GRACE = 5.0  # seconds for the other ranks, once one has failed, and for a stack to be written


class RankError(Exception):
    """What went wrong on a rank, with its traceback."""


class Ranks:
    """Processes of one thread each, started at the first call.

    Args:
        size: how many.
        setup: a function by "module:name", called with the folder that the ranks share and with
            `engine`, once on each rank before anything else.
        engine: by which torch lets the ranks exchange data: "gloo", on the CPU alone, or "nccl"
            with a GPU for each.
    """

    def __init__(self, size, setup=None, engine="gloo"):
        self.size = size
        self._setup, self._engine = setup, engine
        self._processes, self._connections, self._logs = [], [], []
        self._folder = None

    def call(self, function, *args, timeout=60.0):
        """Calls a function by "module:name" on every rank with the same arguments.

        Returns:
            What each rank returned.

        Raises:
            RankError: a rank raised or died, or did not answer within `timeout` seconds.
        """
        if not self._processes:
            self._start()
        for channel in self._connections:
            channel.send((function, args))
        answers = self._answers(time.monotonic() + timeout)
        failures = {rank: text for rank, (is_fine, text) in answers.items() if not is_fine}
        if len(answers) == self.size and not failures:
            return [answers[rank][1] for rank in range(self.size)]
        silent = [rank for rank in range(self.size) if rank not in answers]
        report = [
            f"rank {rank} of {self.size} failed:\n{text}" for rank, text in sorted(failures.items())
        ]
        for rank, stack in self._stacks(silent).items():
            verb = "was still waiting" if failures else f"did not answer within {timeout:g} s"
            report.append(f"rank {rank} of {self.size} {verb}:\n{stack}")
        self.stop()
        raise RankError(f"{function}{args}\n" + "\n".join(report))

    def stop(self):
        """Ends the processes."""
        for channel in self._connections:
            channel.close()
        for process in self._processes:
            process.kill()
            process.join()
        for log in self._logs:
            log.close()
        self._processes, self._connections, self._logs = [], [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self):
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        for rank in range(self.size):
            ours, theirs = FORKS.Pipe()
            path = Path(self._folder.name, f"log-{rank}")
            log = open(path, "w+b")  # noqa: SIM115
            arguments = (theirs, path, rank, self.size, self._engine)
            process = FORKS.Process(target=rank_worker.serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
            self._logs.append(log)
        if self._setup is not None:
            self.call(self._setup, self._folder.name, self._engine, timeout=120.0)

    def _answers(self, deadline):
        """Returns (whether it went well, result or traceback) by rank, of those that answered."""
        answers = {}
        while len(answers) < self.size and time.monotonic() < deadline:
            waiting = {
                channel: rank
                for rank, channel in enumerate(self._connections)
                if rank not in answers
            }
            for channel in connection.wait(list(waiting), max(0.0, deadline - time.monotonic())):
                rank = waiting[channel]
                try:
                    answers[rank] = channel.recv()
                except (EOFError, ConnectionError):
                    self._processes[rank].join()
                    code = self._processes[rank].exitcode
                    name = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
                    answers[rank] = (False, f"it ended with {name}\n{self._log(rank)}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _stacks(self, ranks):
        """Returns where each of these ranks is."""
        begins = {rank: os.fstat(self._logs[rank].fileno()).st_size for rank in ranks}
        for rank in ranks:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        deadline = time.monotonic() + GRACE
        while ranks and time.monotonic() < deadline:
            time.sleep(0.1)
            sizes = {rank: os.fstat(self._logs[rank].fileno()).st_size for rank in ranks}
            if all(sizes[rank] > begins[rank] for rank in ranks):
                break
        return {rank: self._log(rank, begins[rank]) for rank in ranks}

    def _log(self, rank, begin=0):
        self._logs[rank].seek(begin)
        return self._logs[rank].read().decode(errors="replace")[-8000:]


_pools = {}


def ranks(size, engine="gloo"):
    """Returns the `size` ranks that all tests of this process share."""
    if (size, engine) not in _pools:
        _pools[size, engine] = Ranks(size, "rank_jobs:start", engine)
    return _pools[size, engine]


def call_with_page(function, page, folder, engine):
    """Calls a function of `rank_page` on two ranks of their own, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = Ranks(2, engine=engine)
    try:
        return own.call(function, str(page), str(folder), port, timeout=120.0)
    finally:
        own.stop()


def stop_all():
    """Ends all processes; they start again when they are needed."""
    for pool in _pools.values():
        pool.stop()
