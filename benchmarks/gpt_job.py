"""The whole job: train each schedule in turn, save, resume, report."""

from __future__ import annotations

import math
import shlex
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from gpt_checkpoint import load_checkpoint, save_checkpoint
from gpt_config import Config, JobError, Request, new_config, resumed_config
from gpt_data import Corpus, load_corpus
from gpt_report import draw, table, write_csv
from gpt_training import History, Interrupted, Run, StopRequest, train

from lrs_ext import AutoLRS


def run_name(config: Config) -> str:
    schedules = "-".join(config.schedules)
    moment = datetime.now().strftime("%Y%m%d-%H%M%S-%f")  # runs may start in the same second
    return f"gpt-{config.optimizer}-{schedules}-seed{config.seed}-{moment}"


class Job:
    """One schedule after another at the same budget, with one checkpoint for all of them."""

    def __init__(self, request: Request) -> None:
        self.saved: dict[str, Any] | None = None
        if request.resume is None:
            self.config = new_config(request.given)
            folder, name = request.out or Path("runs"), run_name(self.config)
        else:
            self.saved = load_checkpoint(request.resume)
            before = Config.from_dict(self.saved["config"])
            self.config = resumed_config(request.given, before, request.resume)
            folder, name = request.out or request.resume.parent, request.resume.stem
        self.base = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise JobError(
                f"cannot write to {folder}: {error.strerror}: give another folder by --out"
            ) from error
        self.finished: dict[str, History] = {}

    def path(self, ending: str) -> Path:
        return self.base.with_name(self.base.name + ending)

    def resume_command(self) -> str:
        return shlex.join((sys.executable, sys.argv[0], "--resume", str(self.path(".pt"))))

    def load_text(self) -> Corpus:
        """The text to train on, checked against the checkpoint and the context."""
        try:
            corpus = load_corpus()
        except FileNotFoundError as error:
            raise JobError(str(error)) from error
        context = self.config.context
        if self.saved is not None and self.saved["text"] != corpus.digest:
            raise JobError(
                "the standard library differs from the one this checkpoint was trained on:"
                " resume with the same Python version, or start a new run without --resume"
            )
        shortest = min(corpus.train.numel(), corpus.validation.numel())
        if context >= shortest:
            raise JobError(f"--context must be less than {shortest} (the text), got {context}")
        return corpus

    def save(self, run: Run, corpus: Corpus) -> None:
        content = {
            "config": self.config.to_dict(),
            "text": corpus.digest,
            "finished": {name: history.to_dict() for name, history in self.finished.items()},
            "run": run.state_dict(),
        }
        save_checkpoint(self.path(".pt"), content)

    def train_schedule(self, schedule: str, corpus: Corpus, stop: StopRequest) -> History:
        config = self.config
        run = Run(schedule, config, corpus)
        if self.saved is not None and self.saved["run"]["schedule"] == schedule:
            run.load_state_dict(self.saved["run"])
        size = sum(p.numel() for p in run.model.parameters())
        print(
            f"{config.optimizer} with {schedule}, backend {run.optimizer.backend}:"
            f" {size:,} parameters on {config.device}, steps {run.step} to {config.steps}"
        )
        try:
            train(run, stop, lambda: self.save(run, corpus))
        except Interrupted:
            print(f"\nstopped at step {run.step} of {config.steps} ({schedule}) and saved")
            print(f"resume with:\n  {self.resume_command()}")
            raise
        if run.auto is not None:
            searched = len(run.auto.history.losses) - run.auto.to_schedule().total_steps
            run.history.searched = searched
            self.report_search(run.auto, schedule, searched)
        return run.history

    def report_search(self, auto: AutoLRS, schedule: str, searched: int) -> None:
        """Print what AutoLRS has found and draw how."""
        ending = "-search.png" if len(self.config.schedules) == 1 else f"-{schedule}-search.png"
        auto.plot().savefig(self.path(ending), dpi=150)
        print(
            f"AutoLRS found the peak learning rate {auto.to_schedule().lr:.3g} for {schedule}"
            f" in {searched} of {auto.total_steps} updates: {self.path(ending)}"
        )

    def run(self) -> None:
        """Train what is left to train, then report."""
        corpus = self.load_text()
        held_out = len(corpus.validation_files)
        print(
            f"training on {corpus.train.numel():,} bytes of the standard library's source;"
            f" {corpus.validation.numel():,} held out"
            f" ({held_out} of {held_out + len(corpus.train_files)} files)"
        )
        if self.saved is not None:
            for schedule, values in self.saved["finished"].items():
                self.finished[schedule] = History.from_dict(values, self.config.device)
        with StopRequest() as stop:
            for schedule in self.config.schedules:
                if schedule not in self.finished:
                    self.finished[schedule] = self.train_schedule(schedule, corpus, stop)
        self.report()

    def report(self) -> None:
        """Write the CSVs and the picture; print the numbers and every path."""
        config = self.config
        if len(self.finished) == 1:
            (history,) = self.finished.values()
            loss = history.validation[-1][1]
            print(f"validation loss: {loss:.4f} nats/byte ({loss / math.log(2):.4f} bits/byte)")
        else:
            print(table(self.finished))
        picture = self.path(".png")
        peak = "found by AutoLRS" if config.lr is None else f"{config.lr:g}"
        title = f"{config.optimizer}, peak learning rate {peak}, {config.steps:,} steps"
        draw(picture, self.finished, title)
        print(f"picture: {picture}")
        for schedule, history in self.finished.items():
            path = self.path(".csv" if len(self.finished) == 1 else f"-{schedule}.csv")
            write_csv(path, history)
            print(f"csv: {path}")
        print(f"checkpoint: {self.path('.pt')}")
