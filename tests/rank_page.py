"""Runs the code blocks of a page as a script on every rank."""

import os

import torch


def run(page, blocks, folder, port):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(folder)
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    assert not torch.distributed.is_initialized()
