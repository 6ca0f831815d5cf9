"""Checks that run on every rank; see test_distributed.py."""

import cases
import rank_jobs


def equals_one_process(name, how):
    """Every update of an optimizer, bit by bit that of one process."""
    for update in (row for row in cases.UPDATES if row.name == name):
        twins = rank_jobs.Twins(update, how)
        exact = name != "LAMB" or how == "replicate"
        for step in range(cases.STEPS):
            twins.give_gradients(step, skip=(1,) if step < 2 else ())
            twins.opt.step()
            twins.whole_opt.step()
            twins.check(cases.EXACT if exact else cases.TORCH)
