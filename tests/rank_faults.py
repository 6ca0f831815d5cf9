"""What can go wrong on a rank, for the tests of the launcher."""

import ctypes
import os
import time

RANK = int(os.environ.get("RANK", "0"))


def answer(number):
    return RANK, int(os.environ["WORLD_SIZE"]), number


def raise_on(rank):
    if rank == RANK:
        raise ValueError(f"a fault on rank {RANK}")
    wait_for_ever()


def exit_on(rank):
    if rank == RANK:
        os._exit(7)


def crash_on(rank):
    if rank == RANK:
        read_nowhere()


def hang_on(rank):
    if rank == RANK:
        wait_for_ever()


def read_nowhere():
    ctypes.string_at(0)


def wait_for_ever():
    time.sleep(3600)
