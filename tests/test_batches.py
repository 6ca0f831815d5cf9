"""The tape: batches that come again, epochs, and a loader of its own random numbers."""

import collections

import numpy as np
import pytest
import torch
from autolrs_runs import Augmented, make_loader

from lrs_ext.autolrs.batches import Tape, cloned
from lrs_ext.autolrs.random_state import random_state


def draw(tape, loader, count):
    return [tape.next_batch(loader) for _ in range(count)]


def test_recorded_batches_come_again_and_are_used_up():
    tape, loader = Tape(), [1, 2, 3]
    tape.record()
    assert draw(tape, loader, 2) == [1, 2]
    tape.rewind()
    assert draw(tape, loader, 5) == [1, 2, 3, 1, 2]
    tape.rewind()
    tape.release()
    assert draw(tape, loader, 7) == [1, 2, 3, 1, 2, 3, 1]
    tape.record()
    assert draw(tape, loader, 2) == [2, 3]
    tape.release()
    assert draw(tape, loader, 3) == [2, 3, 1]


def test_recording_begins_in_the_middle_of_what_is_kept():
    tape, loader = Tape(), list(range(10))
    tape.record()
    draw(tape, loader, 4)
    tape.release()
    assert draw(tape, loader, 2) == [0, 1]
    tape.record()
    assert draw(tape, loader, 3) == [2, 3, 4]
    tape.rewind()
    assert draw(tape, loader, 4) == [2, 3, 4, 5]


def test_training_draws_the_same_numbers_whether_a_batch_is_new_or_comes_again():
    tape, loader = Tape(), make_loader()
    tape.record()
    state = torch.get_rng_state()
    first = [(tape.next_batch(loader)[0], torch.rand(())) for _ in range(12)]
    torch.set_rng_state(state)
    tape.rewind()
    again = [(tape.next_batch(loader)[0], torch.rand(())) for _ in range(12)]
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y))  # noqa: B905


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize("drawn", [1, 7, 8, 9, 20])
def test_resuming_goes_on_with_the_next_batch(drawn, recording):
    tape, loader = Tape(), make_loader()
    if recording:
        tape.record()
    draw(tape, loader, drawn)
    state, rng = tape.state_dict(), torch.get_rng_state()
    wanted = draw(tape, loader, 12)
    torch.manual_seed(99)
    other, fresh = Tape(), make_loader()
    other.load_state_dict(state)
    torch.set_rng_state(rng)
    other.resume(fresh, restores_itself=False)
    found = draw(other, fresh, 12)
    # Augmentation also draws from Python's and NumPy's generators, which are not restored here.
    assert all(torch.equal(a[1], b[1]) for a, b in zip(wanted, found, strict=True))


def test_a_distributed_sampler_is_told_the_epoch():
    class Sampler:
        epochs = ()

        def set_epoch(self, epoch):
            self.epochs = (*self.epochs, epoch)

    class Loader(list):
        sampler = Sampler()

    loader = Loader([1, 2])
    draw(Tape(), loader, 5)
    assert loader.sampler.epochs == (0, 1, 2)


@pytest.mark.parametrize("loader", [[], iter([1, 2])])
def test_a_loader_without_more_batches(loader):
    with pytest.raises(RuntimeError, match="pass something that can be iterated again"):
        draw(Tape(), loader, 3)


# Batches that their user changes


Pair = collections.namedtuple("Pair", "x y")

CHANGES = {
    "pop": lambda batch: batch.pop("y"),
    "dict": lambda batch: batch["x"].mul_(2.0),
    "list": lambda batch: batch["list"].append(batch["list"][0].zero_()),
    "tuple": lambda batch: batch["tuple"][0].zero_(),
    "namedtuple": lambda batch: batch["pair"].y.zero_(),
    "numpy": lambda batch: batch["array"].fill(7.0),
    "user dict": lambda batch: batch["user"].pop("z"),
}


def make_batch():
    return {
        "x": torch.ones(2),
        "y": torch.ones(1),
        "list": [torch.ones(2)],
        "tuple": (torch.ones(2), "name"),
        "pair": Pair(torch.ones(2), torch.ones(2)),
        "array": np.ones(3),
        "user": collections.UserDict(z=torch.ones(1)),
    }


@pytest.mark.parametrize("change", CHANGES)
def test_changing_a_batch_in_place_changes_no_other_trial(change):
    tape = Tape()
    loader = (make_batch() for _ in range(3))
    tape.record()
    for _ in range(3):
        for batch in draw(tape, loader, 2):
            assert repr(batch) == repr(make_batch())
            assert isinstance(batch["pair"], Pair)
            CHANGES[change](batch)
        tape.rewind()
    state = tape.state_dict()
    tape.release()
    for batch in draw(tape, loader, 3):
        assert repr(batch) == repr(make_batch())
        CHANGES[change](batch)
    tape.load_state_dict(state)
    assert repr(tape.next_batch(loader)) == repr(make_batch())


def test_a_loader_may_write_every_batch_into_the_same_memory():
    memory = torch.zeros(())

    def loader():
        for index in range(3):
            yield memory.fill_(float(index))

    tape, batches = Tape(), loader()
    tape.record()
    assert [batch.item() for batch in draw(tape, batches, 1) + draw(tape, batches, 1)] == [1.0, 1.0]
    tape.rewind()
    assert [batch.item() for batch in draw(tape, batches, 2)] == [0.0, 1.0]


def test_batches_are_not_copied_where_they_do_not_come_again():
    batches = [torch.zeros(1) for _ in range(4)]
    tape = Tape()
    assert tape.next_batch(batches) is batches[0]
    tape.record()
    draw(tape, batches, 2)
    tape.release()
    kept = list(tape._kept)
    assert all(a is b for a, b in zip(draw(tape, batches, 2), kept, strict=True))
    assert not tape._kept
    assert tape.next_batch(batches) is batches[3]


def test_a_copy_keeps_what_a_tensor_is():
    leaf = torch.ones(2, requires_grad=True)
    copied = cloned([leaf * 2.0, leaf, torch.ones(2, 3).t(), torch.eye(2).to_sparse()])
    assert [t.requires_grad for t in copied] == [True, True, False, False]
    assert copied[0].is_leaf
    assert copied[2].stride() == (1, 3)
    assert copied[3].is_sparse


# Loaders that bring a generator, end early, or change


def loader_with_a_generator(place, seed):
    generator, data = torch.Generator().manual_seed(seed), Augmented()
    if place == "loader":
        return torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator)
    sampler = torch.utils.data.RandomSampler(data, generator=generator)
    if place == "sampler":
        return torch.utils.data.DataLoader(data, 8, sampler=sampler)
    batches = torch.utils.data.BatchSampler(sampler, 8, drop_last=False)
    return torch.utils.data.DataLoader(data, batch_sampler=batches)


@pytest.mark.parametrize("drawn", [1, 8, 13])
@pytest.mark.parametrize("place", ["loader", "sampler", "batch sampler"])
def test_a_loader_with_its_own_generator_resumes_on_the_same_batches(place, drawn):
    tape, loader = Tape(), loader_with_a_generator(place, 5)
    draw(tape, loader, drawn)
    state = tape.state_dict()
    wanted = draw(tape, loader, 20)
    other, fresh = Tape(), loader_with_a_generator(place, 6)
    other.load_state_dict(state)
    other.resume(fresh, restores_itself=False)
    found = draw(other, fresh, 20)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(wanted, found, strict=True))


class Epochs:
    """Yields 0 to 3 in epoch 0, 4 to 7 in epoch 1, ..., as a sampler or as something else."""

    def __init__(self, wrap=int):
        self.epoch, self._wrap = 0, wrap

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __iter__(self):
        return (self._wrap(4 * self.epoch + k) for k in range(4))


class Stream(Epochs, torch.utils.data.IterableDataset):
    pass


def loader_that_is_told(place):
    """Returns a loader that yields 0, 1, 2, ... if what is in this place is told the epochs."""
    data = range(100)
    if place == "loader":  # as those of Accelerate
        return Epochs()
    if place == "dataset":
        return torch.utils.data.DataLoader(Stream(), batch_size=None)
    if place == "sampler":
        return torch.utils.data.DataLoader(data, batch_size=1, sampler=Epochs())
    if place == "batch sampler":
        return torch.utils.data.DataLoader(data, batch_sampler=Epochs(lambda index: [index]))
    batches = torch.utils.data.BatchSampler(Epochs(), 1, drop_last=False)
    return torch.utils.data.DataLoader(data, batch_sampler=batches)


@pytest.mark.parametrize(
    "place", ["loader", "dataset", "sampler", "batch sampler", "sampler of a batch sampler"]
)
def test_whatever_shuffles_is_told_the_epoch(place):
    tape, loader = Tape(), loader_that_is_told(place)
    assert draw(tape, loader, 10) == list(range(10))
    other, fresh = Tape(), loader_that_is_told(place)
    other.load_state_dict(tape.state_dict())
    other.resume(fresh, restores_itself=False)
    assert draw(other, fresh, 10) == list(range(10, 20))


def test_a_loader_that_is_shorter_than_the_saved_one_is_refused():
    tape, state = Tape(), random_state()
    draw(tape, [1, 2, 3, 4], 3)
    other = Tape()
    other.load_state_dict(tape.state_dict())
    with pytest.raises(RuntimeError, match=r"gives 2 batches, fewer than the 3 .* same data"):
        other.resume([1, 2], restores_itself=False)
    assert torch.equal(random_state()["torch"], state["torch"])
    other = Tape()
    other.load_state_dict(tape.state_dict())
    other.resume(loader := [1, 2, 3, 4], restores_itself=False)
    assert draw(other, loader, 2) == [4, 1]


def test_another_loader_takes_over_at_the_next_batch_that_is_not_kept():
    tape, first, second = Tape(), [1, 2, 3], [10, 20, 30]
    tape.record()
    tape.resume(first, restores_itself=False)
    draw(tape, first, 2)
    tape.rewind()
    tape.resume(second, restores_itself=False)
    assert draw(tape, second, 4) == [1, 2, 10, 20]
    tape.resume(second, restores_itself=False)
    assert draw(tape, second, 2) == [30, 10]
    with pytest.raises(RuntimeError, match=r"another loader since.*join loaders"):
        tape.next_batch(first)


def test_a_loader_that_has_not_begun_when_the_run_is_saved():
    tape, first, second = Tape(), [1, 2, 3], [10, 20, 30]
    draw(tape, first, 2)
    tape.resume(second, restores_itself=False)
    tape.resume(second, restores_itself=False)
    other = Tape()
    other.load_state_dict(tape.state_dict())
    other.resume(second, restores_itself=False)
    assert draw(other, second, 2) == [10, 20]
