"""Runs the code blocks of a page of the documentation as a script on every rank."""

import os
import re
from pathlib import Path

import torch


def run(page, folder, port):
    """Returns the names that the blocks leave, one after another, in `folder`."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    blocks = re.findall(r"^```python\n(.*?)^```", Path(page).read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 4
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


def run_to_the_end(page, folder, port):
    run(page, folder, port)
    assert not torch.distributed.is_initialized()


def search(page, folder, port):
    """Returns the peak that the last search of the page has found."""
    auto = run(page, folder, port)["auto"]
    assert auto.done
    return auto.history.stages[0].best_lr
