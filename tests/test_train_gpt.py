"""The main job, end to end on tiny models: results, resuming, refusals, no synchronising."""

import csv
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpt_training
import train_gpt
from gpt_checkpoint import load_checkpoint, save_checkpoint
from gpt_config import SCHEDULES, Request, new_config
from gpt_data import Corpus, load_corpus, sample_batch
from gpt_model import GPT

TINY = shlex.split("--device cpu --layers 1 --width 32 --context 32 --batch-size 4")
STEPS = 60


@pytest.fixture(scope="module")
def corpus():
    return load_corpus()


@pytest.fixture
def job(corpus, monkeypatch, capsys, tmp_path):
    """Runs the job with tiny sizes and a text read once: (exit code, stdout, stderr)."""
    gpt_job = pytest.importorskip("gpt_job")  # it imports matplotlib
    monkeypatch.setattr(gpt_job, "load_corpus", lambda: corpus)

    def run(*options, tiny=True):
        sizes = [*TINY, "--out", str(tmp_path)] if tiny else []
        code = train_gpt.main([*sizes, *map(str, options)])
        return code, *capsys.readouterr()

    return run


def signal_at(monkeypatch, number, signum):
    """Send a signal to this process when batch ``number``, counted from 0, is drawn."""
    drawn = itertools.count()

    def draw(*args, **kwargs):
        if next(drawn) == number:
            signal.raise_signal(signum)
        return sample_batch(*args, **kwargs)

    monkeypatch.setattr(gpt_training, "sample_batch", draw)


def printed_path(out, what, ending=""):
    return Path(re.search(rf"^{what}: (.+{ending})$", out, re.MULTILINE)[1])


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def resume_arguments(out):
    python, script, *arguments = shlex.split(out.partition("resume with:\n")[2])
    assert (python, script) == (sys.executable, sys.argv[0])
    return arguments


def flat(state, prefix=""):
    """Every leaf of nested dicts and lists, by path."""
    if not isinstance(state, (dict, list, tuple)):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {k: v for key, value in items for k, v in flat(value, f"{prefix}/{key}").items()}


def assert_same_state(left, right):
    left, right = flat(left), flat(right)
    assert left.keys() == right.keys()
    for key, value in left.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, right[key]), key
        elif not key.endswith("/seconds"):
            assert value == right[key], key


def test_a_run_writes_what_it_prints(job, tmp_path):
    code, out, err = job("--steps", STEPS)
    assert code == 0
    assert printed_path(out, "picture").read_bytes().startswith(b"\x89PNG")
    table = rows(printed_path(out, "csv"))
    assert list(table[0]) == ["step", "lr", "train_loss", "val_loss"]
    assert [int(row["step"]) for row in table] == list(range(STEPS))

    losses = [float(row["train_loss"]) for row in table]
    assert abs(losses[0] - math.log(256)) < 0.2
    assert sum(losses[-10:]) / 10 < losses[0] - 1.0
    shown = float(re.search(r"validation loss: ([\d.]+)", out)[1])
    assert shown == pytest.approx(float(table[-1]["val_loss"]), abs=1e-4)
    assert shown < losses[0] - 1.0

    peak, warmup = 3e-3, 3
    for step, row in enumerate(table):
        progress = (step - warmup) / (STEPS - warmup)
        rex = peak * 2 * (1 - progress) / (2 - progress)
        expected = peak * (step + 1) / warmup if step < warmup else rex
        assert float(row["lr"]) == pytest.approx(expected, rel=1e-6)

    for word in ("loss=", "lr=", "tokens/s=", f"{STEPS}/{STEPS}"):
        assert word in err
    assert {path.suffix for path in tmp_path.iterdir()} == {".png", ".csv", ".pt"}


def test_runs_that_start_in_the_same_second_have_names_of_their_own(tmp_path):
    gpt_job = pytest.importorskip("gpt_job")  # it imports matplotlib
    request = Request({"device": "cpu"}, resume=None, out=tmp_path)
    assert len({gpt_job.Job(request).base for _ in range(10)}) == 10


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_resumes_bit_for_bit(job, monkeypatch, tmp_path, signum):
    handler = signal.getsignal(signum)
    code, out, _ = job("--steps", STEPS, "--seed", 3, "--out", tmp_path / "whole")
    assert code == 0
    whole = printed_path(out, "checkpoint"), printed_path(out, "csv")

    signal_at(monkeypatch, 23, signum)
    code, out, _ = job("--steps", STEPS, "--seed", 3)
    assert code == 128 + signum
    assert f"stopped at step 24 of {STEPS}" in out
    assert not list(tmp_path.glob("*.png"))
    assert signal.getsignal(signum) == handler

    torch.manual_seed(99)  # a new process would not have this one's generator either
    code, out, err = job(*resume_arguments(out), tiny=False)
    assert code == 0
    assert "steps 24 to 60" in out
    assert f"{STEPS}/{STEPS}" in err
    assert printed_path(out, "csv").read_bytes() == whole[1].read_bytes()
    assert_same_state(load_checkpoint(printed_path(out, "checkpoint")), load_checkpoint(whole[0]))


def test_ctrl_c_in_a_terminal(tmp_path, job):
    """The printed command line, run as it stands, ends where an uninterrupted run does."""
    script = [sys.executable, train_gpt.__file__, "--steps", "600", *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as the run it is compared with
    process = subprocess.Popen(
        [*script, "--out", str(tmp_path)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    progress = b""
    while b"loss=" not in progress:
        part = process.stderr.read1()
        assert part, progress.decode()
        progress += part
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err.decode()
    command = out.decode().partition("resume with:\n")[2].strip()
    resumed = subprocess.run(
        shlex.split(command), env=environment, capture_output=True, text=True, timeout=300
    )
    assert resumed.returncode == 0, resumed.stderr

    code, out, _ = job("--steps", 600, "--out", tmp_path / "whole")
    assert code == 0
    assert printed_path(resumed.stdout, "csv").read_text() == printed_path(out, "csv").read_text()


def test_compare_draws_every_schedule_and_resumes(job, monkeypatch, tmp_path):
    names = "rex", "linear", "cosine"
    compare = ["--compare", ",".join(names), "--steps", STEPS]
    code, out, _ = job(*compare)
    assert code == 0
    (picture,) = tmp_path.glob("*.png")
    assert picture == printed_path(out, "picture")
    tables = {name: rows(printed_path(out, "csv", f"-{name}.csv")) for name in names}
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()}
    for name, table in tables.items():
        assert float(lines[name][0]) == pytest.approx(float(table[-1]["val_loss"]), abs=1e-4)
        assert len(table) == STEPS
    assert len({table[0]["train_loss"] for table in tables.values()}) == 1  # same start
    assert len({table[-1]["train_loss"] for table in tables.values()}) == 3

    signal_at(monkeypatch, STEPS + 7, signal.SIGINT)
    code, out, _ = job(*compare, "--out", tmp_path / "stopped")
    assert code == 130
    assert f"stopped at step 8 of {STEPS} (linear)" in out
    code, out, _ = job(*resume_arguments(out), tiny=False)
    assert code == 0
    assert "adamw with rex" not in out  # it was finished
    for name in names:
        assert rows(printed_path(out, "csv", f"-{name}.csv")) == tables[name]


def test_a_diverging_run_stops_with_the_way_out(job, tmp_path):
    code, _, err = job("--steps", STEPS, "--lr", 1e30)
    assert code == 1
    assert "train_gpt.py: error: the " in err
    assert "lower peak, e.g. --lr 1e+29 (it was 1e+30)" in err
    assert not list(tmp_path.glob("*.png"))


def test_a_loss_that_is_infinite_once_is_found(job, monkeypatch):
    """Not only the last loss before a refresh is looked at."""
    calls, loss = itertools.count(), GPT.loss

    def infinite_once(self, *batch):
        return loss(self, *batch) + (math.inf if next(calls) == 3 else 0.0)

    monkeypatch.setattr(GPT, "loss", infinite_once)
    code, _, err = job("--steps", STEPS)
    assert code == 1
    assert "the loss is inf at step 3 (rex, learning rate 0.003)" in err


@pytest.mark.filterwarnings("ignore:AutoLRS")
def test_trials_that_diverge_leave_the_picture_readable(job, monkeypatch, tmp_path):
    """The search may meet any loss and rate; the limits are those of the training after it."""
    figure_class = pytest.importorskip("matplotlib.figure").Figure
    figures, save = [], figure_class.savefig

    def kept(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(figure_class, "savefig", kept)
    options = ["--optimizer", "sgd", "--lr", "auto", "--lr-bounds", "1e-3,1e30"]
    code, out, err = job(*options, "--steps", 100)
    assert code == 0, err
    found, searched = re.search(r"peak learning rate (\S+) for rex in (\d+) of 100", out).groups()
    table = rows(printed_path(out, "csv"))
    losses = [float(row["train_loss"]) for row in table]
    assert not all(map(math.isfinite, losses[: int(searched)]))
    assert all(map(math.isfinite, losses[int(searched) :]))
    top, bottom = figures[-1].axes
    assert bottom.get_ylim()[1] == pytest.approx(1.05 * float(found), rel=1e-2)
    assert top.get_ylim()[1] < 2 * math.log(256)
    (line,) = (line for line in top.lines if line.get_label() == "training")
    assert len(line.get_ydata()) == 100 - int(searched)
    assert all(map(math.isfinite, line.get_ydata()))


def test_the_mean_of_the_last_values_leaves_out_what_is_not_finite():
    gpt_report = pytest.importorskip("gpt_report")  # it imports matplotlib
    smoothed = gpt_report.smooth(np.array([math.nan, 1.0, math.inf, 4.0, 6.0]), 2)
    np.testing.assert_array_equal(smoothed, [math.nan, 1.0, 1.0, 4.0, 5.0])


@pytest.fixture
def checkpoint(job):
    code, out, _ = job("--steps", 12)
    assert code == 0
    return printed_path(out, "checkpoint")


def test_conflicting_options_are_refused_on_resume(job, checkpoint):
    before = checkpoint.read_bytes()
    conflicts = {
        "--steps": ("13", "12"),
        "--lr": ("0.001", "0.003"),
        "--schedule": ("linear", "rex"),
        "--compare": ("rex,linear", "rex"),
        "--optimizer": ("sgd", "adamw"),
        "--seed": ("1", "0"),
        "--width": ("64", "32"),
        "--warmup-steps": ("5", "0"),
        "--backend": ("reference", "the default"),
    }
    for option, (now, then) in conflicts.items():
        code, _, err = job("--resume", checkpoint, option, now, tiny=False)
        assert code == 1
        assert f"{option} {now} conflicts with {checkpoint}, which was started with {then}" in err
        assert f"leave out {option} to continue" in err
    assert checkpoint.read_bytes() == before
    code, _, err = job("--resume", checkpoint, "--steps", "12", "--schedule", "rex", tiny=False)
    assert code == 0, err


def test_what_cannot_be_resumed_is_refused(job, checkpoint, corpus, monkeypatch, tmp_path):
    torn, empty, other = (tmp_path / f"{name}.pt" for name in ("torn", "empty", "other"))
    torn.write_bytes(checkpoint.read_bytes()[:1000])
    empty.touch()
    torch.save({"weights": torch.zeros(2)}, other)
    for path, message in (
        (tmp_path / "none.pt", "no checkpoint at {}: give --resume the .pt file of a stopped run"),
        (torn, "{} is not a readable checkpoint"),
        (empty, "{} is not a readable checkpoint: it is empty"),
        (other, "{} is not a checkpoint of this job"),
    ):
        code, _, err = job("--resume", path, tiny=False)
        assert code == 1
        assert message.format(path) in err

    changed = Corpus(corpus.train_files, corpus.validation_files, corpus.train + 1, corpus.train)
    monkeypatch.setattr("gpt_job.load_corpus", lambda: changed)
    code, _, err = job("--resume", checkpoint, tiny=False)
    assert code == 1
    assert "resume with the same Python version" in err


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    save_checkpoint(path, {"step": 1})

    def disk_full(content, file):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path)["step"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda:99"], "device cuda:99 is not here"),
        (["--device", "toaster"], "unknown device 'toaster': give cpu, cuda or cuda:N"),
        (["--steps", "5", "--warmup-steps", "5"], "must be less than 5, got 5"),
        (["--width", "33"], "width must be a multiple of 32, got 33"),
        (["--context", str(10**9)], "--context must be less than"),
        (["--out", __file__], f"cannot write to {__file__}: File exists: give another folder by"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message, tmp_path, capsys):
    assert train_gpt.main(["--out", str(tmp_path), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "must be positive and finite, got 0"),
        (["--lr", "nan"], "must be positive and finite, got nan"),
        (["--lr", "high"], "must be a number or auto, got high"),
        (["--lr-bounds", "1e-3"], "must be two numbers LOW,HIGH, got 1e-3"),
        (["--lr-bounds", "1,0.1"], "must be 0 < low < high < inf, got 1,0.1"),
        (["--seed", "-1"], "must not be negative, got -1"),
        (["--seed", str(2**64)], f"must be at most {2**64 - 1}, got {2**64}"),
        (["--compare", "rex,sawtooth"], "unknown schedule 'sawtooth': choose from rex, "),
        (["--compare", "rex,rex"], "names a schedule twice: rex,rex"),
        (["--compare", "rex,linear", "--schedule", "rex"], "not allowed with"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        train_gpt.main(options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "command"),
    [("matplotlib", "lrs_ext[plot]"), ("tqdm", "lrs_ext[train]"), ("lrs_ext", "-e .[train]")],
)
def test_a_missing_package_is_named_before_training(job, monkeypatch, tmp_path, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    code, _, err = job("--steps", 12)
    assert code == 1
    assert f"{package} is not installed: pip install {command}" in err
    assert not list(tmp_path.iterdir())


def test_every_schedule_offered_trains(job):
    code, out, _ = job("--compare", ",".join(SCHEDULES), "--steps", 20)
    assert code == 0
    assert re.findall(r"^adamw with (\w+)", out, re.MULTILINE) == list(SCHEDULES)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_every_optimizer_offered_learns(job, optimizer):
    code, out, _ = job("--optimizer", optimizer, "--steps", 40, "--backend", "reference")
    assert code == 0
    assert f"{optimizer} with rex, backend reference" in out
    assert float(re.search(r"validation loss: ([\d.]+)", out)[1]) < math.log(256) - 0.5


def tiny_run(corpus, device):
    sizes = {"layers": 1, "width": 32, "context": 32, "batch_size": 4, "steps": STEPS}
    return gpt_training.Run("rex", new_config({**sizes, "device": device}), corpus)


def test_only_matrices_decay(corpus):
    run = tiny_run(corpus, "cpu")
    decay = {p: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(run.model.parameters()))
    assert all(value == (0.1 if p.dim() == 2 else 0.0) for p, value in decay.items())


class CountReads(TorchDispatchMode):
    """Counts where a value would travel from the device to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reads = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
        self.count += func.overloadpacket.__name__ in reads
        return func(*args, **(kwargs or {}))


def test_an_update_reads_nothing_from_the_device(corpus):
    run = tiny_run(corpus, "cpu")
    with CountReads() as reads:
        for _ in range(3):
            run.update()
        assert reads.count == 0
        run.history.losses[0].item()
        assert reads.count == 1


def test_losses_are_read_only_when_shown(job, monkeypatch):
    spans, read = [], gpt_training.Run.read_losses

    def recorded(self, first):
        spans.append((first, self.step))
        return read(self, first)

    monkeypatch.setattr(gpt_training.Run, "read_losses", recorded)
    with CountReads() as reads:
        code, _, _ = job("--steps", 240)
    assert code == 0
    assert len(spans) <= 240 // gpt_training.SHOW_EVERY + gpt_training.EVALUATIONS
    # One for each span; at an evaluation its loss, and the checkpoint's position and step count.
    assert reads.count <= len(spans) + 3 * gpt_training.EVALUATIONS
    assert (spans[0][0], spans[-1][1]) == (0, 240)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))


@pytest.mark.gpu
def test_an_update_does_not_wait_for_a_gpu(corpus):
    run = tiny_run(corpus, "cuda")
    run.update()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(math.isfinite, run.read_losses(0)))
