"""The tape: batches that come again, epochs, and a loader of its own random numbers."""

import pytest
import torch
from autolrs_runs import make_loader

from lrs_ext.autolrs.batches import Tape


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
