"""One rank of `ranks.Ranks`: calls the functions that come through a connection."""

import faulthandler
import importlib
import signal
import sys
import traceback
from multiprocessing.connection import Connection


def main():
    channel = Connection(int(sys.argv[1]))
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


if __name__ == "__main__":
    main()
