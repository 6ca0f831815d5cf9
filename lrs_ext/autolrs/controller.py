"""AutoLRS: finds the learning rate while the model trains, without waiting for the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lrs_ext.autolrs.batches import Tape
from lrs_ext.autolrs.checks import (
    check_loss,
    check_model,
    check_plan,
    check_state,
    check_val_loss,
    checked_bounds,
    checked_extras,
)
from lrs_ext.autolrs.guard import Guard
from lrs_ext.autolrs.history import History, read_history, read_learning_rates
from lrs_ext.autolrs.live_state import is_scaler
from lrs_ext.autolrs.measurements import VALIDATIONS, Measurements, keeping_modes
from lrs_ext.autolrs.notices import Notices
from lrs_ext.autolrs.presets import PaperSearch, PeakSearch, Search
from lrs_ext.autolrs.random_state import random_state, set_random_state
from lrs_ext.autolrs.ranks import Ranks
from lrs_ext.autolrs.rates import check_optimizer, check_whole, rates_of
from lrs_ext.autolrs.ratios import check_ratios, group_ratios
from lrs_ext.autolrs.replicas import Replicas, check_replicas
from lrs_ext.autolrs.scheduler_watch import SchedulerWatch
from lrs_ext.autolrs.search import rate_at
from lrs_ext.autolrs.shapes import Shapes, usual_warmup
from lrs_ext.autolrs.snapshot import Snapshot
from lrs_ext.autolrs.step_watch import StepWatch
from lrs_ext.autolrs.timetable import Segment, timetable_of
from lrs_ext.capture_checks import check_outside
from lrs_ext.constructors import from_values
from lrs_ext.drivers import check_free, register
from lrs_ext.number_checks import checked_integer
from lrs_ext.param_devices import first_device
from lrs_ext.schedules import Schedule
from lrs_ext.wrappers import unwrapped

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.distributed import ProcessGroup


class AutoLRS:
    """Finds the learning rate of `optimizer` on the fly, trials counted in the budget.

    Make it when model, optimizer and whatever a checkpoint brings are in place. Trials start from
    the same state, on the same batches if they come from `batches`; what they have done to the
    state is undone, in place. The host only counts updates.

    On several ranks, make it on each of them: all follow the mean of their losses, and the first
    one's decisions. See docs/autolrs_ranks.md.

    Args:
        optimizer: of `lrs_ext`, or of torch with support for a tensor learning rate, or a
            framework's wrapper around it. Its learning rates must be positive, unless a state is
            loaded before the next update: their ratios between groups are kept.
        model: the module that is trained; what is frozen in it is not copied, see `Snapshot`.
        lr_bounds: (low, high), the learning rates of the first group to search between.
        total_steps: optimizer updates in all, trials included.
        preset: "peak" searches once for the peak of `schedule`; "paper" searches in every stage,
            and takes losses that are never negative.
        schedule: the shape to train with: the name of a constructor ("rex", "linear", ...) or a
            `Schedule` with a profile, whose height and length do not matter. "paper" ends with it.
        search_fraction: share of the budget that the trials of "peak" take at most, except in very
            short runs: a trial has 4 to 10 updates. None is 0.1.
        num_trials: in a stage; None is 10 for "paper" and for "peak" 8, 6 in short runs.
        stage_steps, trial_steps: see `timetable.paper_stages`; "peak" takes its trial length from
            `search_fraction` unless `trial_steps` is given.
        warmup_steps: of linear warm-up: in "peak" after the search, None is a tenth of what remains
            then, or 0 for "one_cycle", which rises by itself; in "paper" before it, up to the
            optimizer's own learning rate, None is 0.
        val_loss: returns a 0-d loss to judge trials by; None judges by the training loss. It runs
            under `torch.no_grad`, first when the controller is made; the modules of `model` that
            it puts into evaluation mode are put back.
        extra_state: what else to roll back: scaler, EMA, target network, loader, ...
        snapshot: where the copy of the state is: "device" or "pinned" host memory.
        process_group: the ranks that train this model; None takes all there are.
        parallel_trials: whether ranks try different learning rates at the same time, each on its
            own: `model` must be the DistributedDataParallel module.
        seed: of the random first trials of "paper".

    Raises:
        ValueError, TypeError: an argument is out of range, or the trials do not fit the budget.
        RuntimeError: the optimizer has a controller already, the snapshot does not fit, or ranks
            have different arguments.

    Source: Jin et al., AutoLRS: Automatic Learning-Rate Schedule by Bayesian Optimization on the
    Fly, ICLR 2021, arXiv 2105.10762.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: torch.nn.Module,
        lr_bounds: tuple[float, float],
        total_steps: int,
        *,
        preset: Literal["peak", "paper"] = "peak",
        schedule: str | Schedule = "rex",
        search_fraction: float | None = None,
        num_trials: int | None = None,
        stage_steps: int | Sequence[int] | None = None,
        trial_steps: int | None = None,
        warmup_steps: int | None = None,
        val_loss: Callable[[], Tensor] | None = None,
        extra_state: Sequence[Any] = (),
        snapshot: Literal["device", "pinned"] = "device",
        process_group: ProcessGroup | None = None,
        parallel_trials: bool = False,
        seed: int = 0,
    ) -> None:
        optimizer = unwrapped(optimizer)
        check_optimizer(optimizer)
        check_whole(optimizer)
        check_model(model)
        check_val_loss(val_loss)
        bounds = checked_bounds(lr_bounds)
        seed = checked_integer("seed", seed)
        self._ranks = Ranks(process_group)
        if parallel_trials:
            check_replicas(model)
        self._timetable = timetable_of(
            preset,
            total_steps=total_steps,
            search_fraction=search_fraction,
            num_trials=num_trials,
            stage_steps=stage_steps,
            trial_steps=trial_steps,
            warmup_steps=warmup_steps or 0,
            replicas=self._ranks.size if parallel_trials else 1,
        )
        if warmup_steps is None:
            train = self._timetable.segments[-1].steps
            warmup_steps = usual_warmup(schedule, train) if preset == "peak" else 0
        check_free(optimizer)
        self.preset, self.optimizer = preset, optimizer
        self._extra_state = checked_extras(extra_state)
        device = first_device(optimizer)
        self._shapes = Shapes(schedule, self._timetable, warmup_steps, device)
        ratios = group_ratios(optimizer.param_groups)
        self._base_lr = float(optimizer.param_groups[0]["lr"])
        self._snapshot = Snapshot(model, optimizer, self._extra_state, placement=snapshot)
        self._rates = rates_of(optimizer, ratios, self.total_steps + 1)
        kind = PeakSearch if preset == "peak" else PaperSearch
        self._search: Search = kind(self._timetable, bounds, device, seed, self._ranks.agree)
        are_apart = self._timetable.at_once > 1
        self._replicas = Replicas(
            self._ranks, model if are_apart else None, self._timetable.at_once, device
        )
        self._measured = Measurements(
            self._timetable,
            self._ranks,
            self._replicas,
            None if val_loss is None else keeping_modes(model, val_loss),
            VALIDATIONS[preset],
            device,
        )
        self._tape = Tape(self._replicas.share if are_apart else None)
        self._notices = Notices(are_given=self._ranks.rank == 0)
        self._must_restore = False  # a wave that a loaded state was saved in begins again
        self._guard = Guard(
            self._search, self._measured, self._snapshot, self._rates, self._ranks, self._notices
        )
        self._updates = 0
        self._index = 0  # of the segment
        self._open: Literal["", "update", "segment"] = ""  # what `_finish` still has to follow
        has_scaler = any(map(is_scaler, self._extra_state))
        self._watch = StepWatch(optimizer, may_skip=has_scaler)
        self._scheduler_watch = SchedulerWatch(optimizer, self._rates)
        self._plan: dict[str, Any] = {
            "preset": preset,
            "lr_bounds": list(bounds),
            "total_steps": self.total_steps,
            "num_trials": self._timetable.num_trials,
            "at_once": self._timetable.at_once,
            "search_steps": self._timetable.search_steps,
            "stages": self._timetable.num_stages,
            "warmup_steps": int(warmup_steps),
            "schedule": self._shapes.schedule.to_dict(),
            "ratios": ratios,
            "seed": seed,
        }
        self._ranks.host_check_alike(self._plan)
        self._begin()
        self._register()

    # What users see

    @property
    def total_steps(self) -> int:
        """Optimizer updates in all, trials included."""
        return self._timetable.total_steps

    @property
    def done(self) -> bool:
        """Whether the budget is used up."""
        return self._updates == self.total_steps

    @property
    def phase(self) -> Literal["search", "train"]:
        """Whether the next update belongs to a trial."""
        return "search" if self._segment.kind == "trial" else "train"

    @property
    def progress(self) -> str:
        """Where the run is, in words for a progress bar."""
        segment = self._segment
        stage = f"stage {segment.stage + 1}, " if self._timetable.num_stages > 1 else ""
        if segment.kind == "trial":
            first, last = segment.trial + 1, segment.trial + segment.width
            which = f"trial {first}" if first == last else f"trials {first} to {last}"
            return f"{stage}{which} of {self._timetable.num_trials}"
        return f"{stage}{segment.kind}"

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of memory that the copy of the training state takes."""
        return self._snapshot.nbytes

    @property
    def history(self) -> History:
        """What has been tried, forecast and chosen so far; waits for the device."""
        scales = self._guard.scales
        return read_history(
            self._search, self._shapes, self._measured, scales, self._updates, self._base_lr
        )

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Yields the loader's batches until the budget is used up, and a trial's for every trial.

        The batches of a trial are kept, also in checkpoints, and training begins with them. A
        loader at its end is iterated again; ``set_epoch`` is called where the loader, its dataset
        or one of its samplers has it.
        What prefetches belongs around the loader, not around this: it would draw ahead of a trial.

        Raises:
            ValueError: a group of the optimizer has a learning rate of 0.
            RuntimeError: the loader has run dry and cannot be iterated again, or the optimizer has
                made several updates without a call of `step`.
        """
        check_ratios(self._plan["ratios"])
        restores_itself = any(loader is extra for extra in self._extra_state)
        if restores_itself:
            self._snapshot.leave(loader)  # the batches of a trial come again from here
        if self._must_restore:
            self._must_restore = False
            self._snapshot.restore(is_resumed=True)
            self._replicas.pair_random(is_new=False)
            rate = self._replicas.part(self._search.rates(self._segment))
            self._rates.write(rate, self._shapes.of(self._segment))
            self._watch.follow()
        elif self._updates == 0:
            self._snapshot.capture()  # the state may have changed since the controller was made
            if self._is_apart:
                self._replicas.pair_random(is_new=True)
            self._watch.follow()
        self._tape.resume(loader, restores_itself)
        self._finish()
        while not self.done:
            yield self._tape.next_batch(loader)
            self._watch.check_followed()
            self._finish()

    def step(self, loss: Tensor) -> None:
        """Follows one update of the optimizer; never waits for the device.

        What an exception in `val_loss` has interrupted, here or in a run that is resumed, is
        finished by the next draw from `batches`, or else by the next call. That call does only
        this: an update made in between does not count.

        Args:
            loss: what the update was made from: floating, 0-d.

        Raises:
            TypeError, ValueError: it is no such tensor; or see `batches`.
            RuntimeError: the optimizer has not stepped since the last call, or the budget is used
                up; or a scheduler of torch has written a learning rate; or a CUDA graph is being
                captured.

        Warns:
            UserWarning: the trials did not tell the learning rates apart or saw other batches, or
                training has diverged and was rolled back; once the host knows.
        """
        check_outside("auto.step()", self._rates.rate.device)
        if self._open:
            self._finish()
            self._watch.follow()
            return
        if self.done:
            raise RuntimeError(
                f"the budget of {self.total_steps} updates is used up: stop when auto.done is true"
            )
        check_loss(loss, "the loss")
        check_ratios(self._plan["ratios"])
        segment = self._segment
        if self._is_apart and (self._must_restore or not self._tape.is_in_use):
            raise RuntimeError(
                "parallel_trials compares learning rates on equal batches, which come from "
                "auto.batches(loader): draw them from there"
            )
        self._watch.check()
        self._rates.check_groups()
        self._scheduler_watch.check()
        self._watch.follow()
        self._measured.add_loss(segment, self._updates, loss)
        self._updates += 1
        self._open = "update"
        self._rates.advance()
        self._finish()
        self._rates.show()
        self._notices.give()

    def metrics(self) -> dict[str, float]:
        """Returns plain numbers for a logger; waits for the device.

        "autolrs/lr" is that of the next update in the first group, "autolrs/best_lr" NaN before the
        search has ended.
        """
        segment = self._segment
        shape = self._shapes.of(segment).at(min(self._updates, segment.end - 1) - segment.start)
        return {
            "autolrs/updates": float(self._updates),
            "autolrs/stage": float(segment.stage),
            "autolrs/trial": float(segment.trial),
            "autolrs/searching": float(self.phase == "search"),
            "autolrs/lr": self._rates.rate.item() * shape,
            "autolrs/best_lr": rate_at(self._search.best[segment.stage]).item(),
        }

    def to_schedule(self) -> Schedule:
        """Returns the schedule that was found, to train with it without a search.

        It is that of the first group, from the first update of the training; waits for the device.
        In "peak", where the training had to be rolled back, it begins with the peak that was too
        high. In "paper" it is `from_values`: warm-up and stages as they were trained, trials left
        out, and the last stage to its end, as planned by now.

        Raises:
            RuntimeError: the last search has not ended.
        """
        if self._segment is not self._timetable.segments[-1]:
            raise RuntimeError(
                "the search has not ended: call it when auto.phase is 'train', in the last stage"
            )
        if self.preset == "peak":
            return self._shapes.schedule.scaled(rate_at(self._search.best[0]).item())
        rates = read_learning_rates(
            self._search, self._shapes, self._guard.scales, self.total_steps, self._base_lr
        )
        trained = [s for s in self._timetable.segments if s.kind != "trial"]
        return from_values(np.concatenate([rates[s.start : s.end] for s in trained]))

    def plot(self) -> Figure:
        """Returns a matplotlib Figure: learning rates, posteriors, forecasts and what came."""
        from lrs_ext.plots import plot_history

        return plot_history(self.history)

    def state_dict(self) -> dict[str, Any]:
        """Returns all it takes to go on from here, in mid-trial too.

        Save it together with the states of model, optimizer and `extra_state`. It holds the copy of
        the training state and the batches of the present trials.

        On several ranks it exchanges nothing and is the same on all, but "of_this_rank": batches
        and random generators, which only a rank of the same number takes over from it. Trials that
        run at once begin again where they are resumed.
        """
        snapshot, tape = self._snapshot.state_dict(), self._tape.state_dict()
        rates = self._rates.state_dict()
        if self._is_apart:  # not the same on all
            rates["rate"] = self._search.rates(self._segment)[0]
            rates |= {"shown": None} if "shown" in rates else {}
        own = {
            "snapshot": snapshot.pop("of_this_rank"),
            "tape": tape.pop("of_this_rank"),
            "random": random_state(),
        }
        return {
            "plan": tuple(self._plan.items()),
            "updates": self._updates,
            "open": self._open,
            "base_lr": self._base_lr,
            "scales": self._guard.scales.clone(),
            "measured": self._measured.state_dict(),
            "search": self._search.state_dict(),
            "rates": rates,
            "snapshot": snapshot,
            "tape": tape,
            "replicas": self._replicas.state_dict(),
            "of_this_rank": ((self._ranks.rank, self._ranks.size), own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was called; model, optimizer and `extra_state` load their own.

        `batches` then passes over what the saved run has drawn of the loader's epoch, but not if
        the loader is in `extra_state`.

        Raises:
            ValueError: the state is not one of AutoLRS, or belongs to another plan (other bounds,
                budget, trials, ...) or to another model.
        """
        check_state(state)
        saved, known = dict(state["plan"]), self._plan
        if state["rates"]["taken_over"]:
            # The optimizer may have loaded what the host had put there.
            known = known | {"ratios": [0.0] * len(known["ratios"])}
        check_plan(saved, known)
        rank, own = state["of_this_rank"]
        is_own = tuple(rank) == (self._ranks.rank, self._ranks.size)
        self._snapshot.load_state_dict(
            {**state["snapshot"], "of_this_rank": own["snapshot"]}, is_own
        )
        self._updates, self._open = state["updates"], state["open"]
        self._base_lr = state["base_lr"]
        self._index = self._timetable.index_at(self._updates - (self._open == "update"))
        self._guard.scales.copy_(state["scales"])
        self._measured.load_state_dict(state["measured"])
        self._search.load_state_dict(state["search"])
        self._tape.load_state_dict({**state["tape"], "of_this_rank": own["tape"]}, is_own)
        self._plan["ratios"] = list(saved["ratios"])
        self._rates.set_ratios(saved["ratios"])
        self._rates.load_state_dict(state["rates"], self._shapes.of(self._segment))
        self._replicas.load_state_dict(state["replicas"])
        self._resume_wave()
        self._watch.follow()
        if is_own:
            set_random_state(own["random"])

    # What happens between updates

    @property
    def _segment(self) -> Segment:
        return self._timetable.segments[self._index]

    @property
    def _is_apart(self) -> bool:
        """Whether this rank tries a learning rate of its own."""
        return self._replicas.are_apart and self._segment.kind == "trial"

    def _finish(self) -> None:
        """Does what follows an update, from where an exception in `val_loss` has stopped it."""
        segment = self._segment
        if self._open == "update":
            if segment.kind == "trial":
                self._measured.validate(segment, self._updates - segment.start)
            elif segment.kind == "train":
                self._guard.look(segment, self._updates)
            is_over = self._updates == segment.end
            if is_over and segment.kind == "trial":
                self._end_trials(segment)
            has_next = is_over and segment is not self._timetable.segments[-1]
            self._index += has_next
            self._open = "segment" if has_next else ""
        if self._open == "segment":
            self._begin()
            self._open = ""

    def _begin(self) -> None:
        """Sets the learning rate of the segment that begins."""
        segment = self._segment
        if segment.kind == "warmup":
            self._snapshot.capture()  # a state that is saved from now on needs a copy to load
            rate = self._search.grid.new_full((), self._base_lr)
        elif segment.kind == "trial":
            is_first = segment.trial == 0
            if is_first:  # the others start from the same state
                self._snapshot.capture()
                self._tape.record()
            self._measured.validate(segment, 0)
            self._search.propose(segment.stage, segment.trial, segment.width)
            if self._is_apart and self._updates > 0:  # before the first update, `batches` does it
                self._replicas.pair_random(is_new=is_first)
            rate = self._replicas.part(self._search.rates(segment))
        else:
            rate = self._search.choose(segment.stage)
            losses = self._measured.first_losses(segment.stage)
            self._notices.expect(*self._search.doubts(segment.stage, *losses))
            self._replicas.join()
        self._rates.write(rate, self._shapes.of(segment))

    def _end_trials(self, segment: Segment) -> None:
        for trial in segment.trials:
            self._search.record(segment.stage, trial, *self._measured.of_trial(segment, trial))
        self._snapshot.restore()
        is_last = segment.trials.stop == self._timetable.num_trials
        self._tape.release() if is_last else self._tape.rewind()

    def _resume_wave(self) -> None:
        """Begins the trials again that ran at once when a loaded state was saved.

        Each rank then had weights of its own, of which a checkpoint may have one rank's only.
        """
        self._replicas.join()  # until trials begin
        has_begun = self._updates > 0 and self._open != "segment"
        self._must_restore = self._is_apart and has_begun
        if self._must_restore:
            self._updates, self._open = self._segment.start, ""
            self._tape.rewind()

    def _register(self) -> None:
        """Writes the rates again whenever the optimizer has loaded a checkpoint."""
        controller = weakref.ref(self)

        def attach(*_: Any) -> None:
            present = controller()
            if present is not None:
                present._rates.attach()

        handle = self.optimizer.register_load_state_dict_post_hook(attach)
        weakref.finalize(self, handle.remove)
        register(self.optimizer, self)
