"""One rank of `ranks.Ranks`: calls the functions that come through a connection."""

import faulthandler
import importlib
import os
import signal
import traceback


def serve(channel, log, rank, size, engine):
    """Answers calls until the connection ends; what is printed goes to the file `log`.

    Ranks that exchange data by gloo see no GPU: there may be fewer than ranks.
    """
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    if engine == "gloo":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)
    while True:
        try:
            function, args = channel.recv()
        except EOFError:
            return
        try:
            module, _, name = function.partition(":")
            answer = (True, getattr(importlib.import_module(module), name)(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        channel.send(answer)
