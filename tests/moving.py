"""Optimizers whose weight decay and momentum follow the schedules of a row of `cases.MOVING`."""

import reference

import lrs_ext


def schedule_of(row):
    return getattr(lrs_ext, row.name)(row.lr, row.total_steps, **row.options)


def value_of(row, step):
    return reference.schedule(row.name, step, lr=row.lr, total_steps=row.total_steps, **row.options)


def with_numbers(row, numbers):
    """Returns the row's options with these numbers, by the keys of `row.numbers`."""
    options = {**row.update.options, **numbers}
    if "beta1" in options:
        options["betas"] = (options.pop("beta1"), options["betas"][1])
    return options


def with_schedules(row):
    return with_numbers(row, {name: schedule_of(s) for name, s in row.numbers.items()})


def with_values(row, step):
    return with_numbers(row, {name: value_of(s, step) for name, s in row.numbers.items()})


def numbers_in(group, row):
    """Returns what a group shows of the numbers that move."""
    return {n: group["betas"][0] if n == "beta1" else group[n] for n in row.numbers}


def put(group, name, value):
    group.update({"betas": (value, group["betas"][1])} if name == "beta1" else {name: value})
