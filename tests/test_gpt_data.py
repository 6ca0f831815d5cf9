"""The main job's text: whole files held out, batches that are pure functions of (seed, step)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from gpt_data import load_corpus, sample_batch, validation_batches


def test_whole_files_are_held_out(tmp_path):
    corpus = load_corpus()
    assert len(corpus.train_files) > 100
    assert set(corpus.train_files).isdisjoint(corpus.validation_files)
    share = corpus.validation.numel() / (corpus.train.numel() + corpus.validation.numel())
    assert 0.03 < share < 0.3
    again = load_corpus()
    assert (again.train_files, again.validation_files) == (
        corpus.train_files,
        corpus.validation_files,
    )
    assert again.digest == corpus.digest

    for number in range(40):
        (tmp_path / f"{number}.py").write_text(f"# {number % 20:02}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("# no\n")
    small = load_corpus(tmp_path)
    parts = [
        {bytes(text[i : i + 5].tolist()) for i in range(0, text.numel(), 5)}
        for text in (small.train, small.validation)
    ]
    assert parts[0].isdisjoint(parts[1])
    assert parts[0] | parts[1] == {f"# {number:02}\n".encode() for number in range(20)}


def test_a_batch_is_a_function_of_seed_and_step():
    text = torch.arange(200, dtype=torch.uint8)
    size = {"batch_size": 5, "context": 16}
    inputs, targets = sample_batch(text, seed=1, step=2, **size)
    assert inputs.shape == targets.shape == (5, 16)
    assert torch.equal(inputs + 1, targets)
    assert torch.equal(sample_batch(text, seed=1, step=2, **size)[0], inputs)
    for other in ({"seed": 1, "step": 3}, {"seed": 2, "step": 2}, {"seed": 2, "step": 1}):
        assert not torch.equal(sample_batch(text, **other, **size)[0], inputs)


def test_validation_windows_span_the_text():
    text = torch.arange(200, dtype=torch.uint8)
    batches = list(validation_batches(text, batches=4, batch_size=2, context=16))
    starts = [start for inputs, _ in batches for start in inputs[:, 0].tolist()]
    assert starts == sorted(set(starts))
    assert (starts[0], batches[-1][1][-1, -1].item()) == (0, 199)
