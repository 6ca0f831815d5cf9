"""One optimizer step as an operator, for functional code and whole graphs of `torch.compile`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lrs_ext import ops
from lrs_ext.backends import select_backend
from lrs_ext.layout import is_dense, same_layout
from lrs_ext.state_storage import Storage
from lrs_ext.tensor_checks import check_numbers, check_params

STATE_NAMES = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "lion": ("exp_avg",),
    "lamb": ("exp_avg", "exp_avg_sq"),
}
FEWEST_STATES = {"sgd": 0, "adam": 2, "lion": 1, "lamb": 2}
HYPER_NAMES = {
    "sgd": ("weight_decay", "maximize", "momentum", "dampening", "nesterov"),
    "adam": ("weight_decay", "maximize", "beta1", "beta2", "eps", "decoupled_weight_decay"),
    "lion": ("weight_decay", "maximize", "beta1", "beta2"),
    "lamb": (
        "weight_decay",
        "maximize",
        "beta1",
        "beta2",
        "eps",
        "bias_correction",
        "always_adapt",
    ),
}


def step(
    algorithm: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    counters: list[Tensor],
    lr: Tensor,
    position: Tensor,
    hyper: list[float],
) -> None:
    """Updates all parameters in one launch and advances the schedule, as an optimizer's step.

    `torch.compile` sees one operator that changes its arguments in place; the learning rate is
    read on the device, so that one graph serves a whole schedule. From the second call with the
    same tensors on, the tables of their addresses are kept, and the tensors with them, for as long
    as `position` is.

    Args:
        algorithm: "sgd", "adam" (AdamW with a decoupled_weight_decay of 1), "lion" or "lamb", which
            takes two launches.
        params, grads: float32, bfloat16 or float16, dense; a gradient for each parameter.
        states: the arrays of the first parameter, then of the next: float32, laid out as it, in the
            order of `STATE_NAMES`; for "sgd" none or one each, for "adam" two, or three for
            amsgrad.
        counters: each parameter's updates so far, float32, 0-d.
        lr: learning rates, float32, shape (updates,): a row of `ScheduleBuffer.values`, or one.
        position: int64, 0-d: which of them is next; the last one holds.
        hyper: the numbers of `HYPER_NAMES`, in that order.

    Raises:
        ValueError: the lists do not fit together, a tensor that changes is there twice, or a number
            is not finite.
        RuntimeError: a tensor has a dtype, device or layout that the kernels do not serve, the
            stream is being captured into a CUDA graph, or LRS_EXT_BACKEND asks for "reference".

    >>> import torch, lrs_ext
    >>> p, position = torch.ones(2), torch.tensor(0)
    >>> lr = lrs_ext.ScheduleBuffer(1, 5).fill_(0, lrs_ext.linear(0.5, total_steps=4)).rows[0]
    >>> for _ in range(2):
    ...     lrs_ext.functional.step(
    ...         "sgd", [p], [torch.ones(2)], [], [torch.zeros(())], lr, position, [0.0] * 5)
    >>> p.tolist(), int(position)
    ([0.125, 0.125], 2)
    """
    torch.ops.lrs_ext.step.default(algorithm, params, grads, states, counters, lr, position, hyper)


class _Call(NamedTuple):
    """What the tables of a step are made of."""

    algorithm: str
    backend: str
    params: list[Tensor]
    states: list[Tensor]
    counters: list[Tensor]
    position: Tensor

    @property
    def kept(self) -> int:
        """How many states a parameter has."""
        return len(self.states) // len(self.params)


class _Tables:
    """The tables of a step, ready for the next one of the same tensors."""

    def __init__(self, call: _Call) -> None:
        names, kept = list(STATE_NAMES[call.algorithm][: call.kept]), call.kept
        self._params = call.params
        self._state = {
            param: dict(zip(names, call.states[kept * i : kept * (i + 1)], strict=True))
            for i, param in enumerate(call.params)
        }
        self._groups = ops.GroupTable(1, call.position.device)
        self._written: object = None
        self._table = ops.StepTable(
            backend=call.backend,
            algorithm=call.algorithm,
            param_lists=[call.params],
            positions=list(range(len(call.params))),
            state=self._state,
            state_names=[names],
            steps=call.counters,
            groups=self._groups,
            step=call.position.detach(),  # which does not keep the position itself
            storage=Storage(),
        )

    def run(self, grads: list[Tensor], lr: Tensor, numbers: Mapping[str, float]) -> bool:
        """Updates all parameters; False if an address has changed or a gradient does not fit."""
        if not self._table.refresh([self._params], self._state, [*grads]):
            return False
        row = (lr.data_ptr(), lr.numel(), numbers)
        if row != self._written:
            self._groups.write(0, lr.detach(), numbers)
            self._written = row
        self._table.run()
        return True


class _LastCall:
    """What came last with a position, and its tables if it had come before that too.

    Of what comes once nothing is kept, such as copies that a compiler makes.
    """

    def __init__(self, call: _Call, tables: _Tables | None) -> None:
        self._key, tensors = _parts(call)
        self._tensors = [weakref.ref(tensor) for tensor in tensors]
        self.tables = tables

    def is_like(self, call: _Call) -> bool:
        key, tensors = _parts(call)
        return key == self._key and all(
            ref() is tensor for ref, tensor in zip(self._tensors, tensors, strict=True)
        )


def _parts(call: _Call) -> tuple[tuple[object, ...], list[Tensor]]:
    """Returns what two calls for the same tables have in common: numbers and tensors."""
    address = call.position.data_ptr()
    return (
        (call.algorithm, call.backend, address, len(call.params), len(call.states)),
        [*call.params, *call.states, *call.counters],
    )


_last_calls: MutableMapping[Tensor, _LastCall] = WeakTensorKeyDictionary()  # by position


def _step(
    algorithm: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    counters: list[Tensor],
    lr: Tensor,
    position: Tensor,
    hyper: list[float],
) -> None:
    _check_lengths(algorithm, params, grads, states, counters, hyper)
    numbers = dict(zip(HYPER_NAMES[algorithm], hyper, strict=True))
    check_numbers(numbers)
    _check_schedule(lr, position)
    if position.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "lrs_ext.functional.step cannot be captured into a CUDA graph: capture the step() of "
            "an optimizer, or call it outside of the graph"
        )
    if not params:
        return
    call = _Call(algorithm, _backend(position.device), params, states, counters, position)
    last = _last_calls.pop(position, None)  # no other thread's while a kernel reads from them
    if last is not None and not last.is_like(call):
        last = None
    if last is None or last.tables is None or not last.tables.run(grads, lr, numbers):
        _check_memory(call)
        tables = _Tables(call)
        if not tables.run(grads, lr, numbers):
            raise RuntimeError(
                "a gradient differs from its parameter in dtype, device, shape or layout, or two "
                "parameters are the same tensor"
            )
        last = _LastCall(call, None if last is None else tables)
    _last_calls[position] = last
    torch.autograd.graph.increment_version([*states, *counters, position])


# Not by `torch.library.custom_op`, whose wrappers take more time than the step.
torch.library.define(
    "lrs_ext::step",
    "(str algorithm, Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, "
    "Tensor(c!)[] counters, Tensor lr, Tensor(d!) position, float[] hyper) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),  # its tables may be replaced
)
torch.library.impl("lrs_ext::step", "default", _step)
torch.library.register_fake("lrs_ext::step", lambda *_: None)


def _backend(device: torch.device) -> str:
    backend = select_backend(None, device)
    if backend == "reference":
        raise RuntimeError(
            "lrs_ext.functional.step has no reference backend, which LRS_EXT_BACKEND asks for: "
            "unset it, or call the step() of an optimizer"
        )
    return backend


def _check_lengths(
    algorithm: str,
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    counters: list[Tensor],
    hyper: list[float],
) -> None:
    """Raises ValueError unless there is as much of everything as the update of `params` needs."""
    if algorithm not in STATE_NAMES:
        raise ValueError(f"algorithm must be one of {sorted(STATE_NAMES)}, got {algorithm!r}")
    names, hyper_names = STATE_NAMES[algorithm], HYPER_NAMES[algorithm]
    kept = len(states) // max(len(params), 1)
    if not len(params) == len(grads) == len(counters) or len(states) != kept * len(params):
        raise ValueError(
            "a gradient, a counter and equally many states are needed for each parameter, got "
            f"{len(params)} parameters, {len(grads)} gradients, {len(counters)} counters and "
            f"{len(states)} states"
        )
    fewest = FEWEST_STATES[algorithm]
    if params and not fewest <= kept <= len(names):
        raise ValueError(f"{algorithm} has {fewest} to {len(names)} states, got {kept}")
    if len(hyper) != len(hyper_names):
        raise ValueError(f"hyper must be the {len(hyper_names)} numbers {hyper_names}, got {hyper}")


def _check_schedule(lr: Tensor, position: Tensor) -> None:
    """Raises RuntimeError unless the kernels can read a learning rate from `lr` at `position`."""
    if position.dtype != torch.int64 or position.dim() != 0:
        raise RuntimeError(
            f"position must be int64 and 0-d, got {position.dtype} of shape {tuple(position.shape)}"
        )
    if lr.dim() > 1 or lr.numel() == 0:
        raise RuntimeError(f"lr must be one number or a row of them, got shape {tuple(lr.shape)}")
    if lr.dtype != torch.float32 or not lr.is_contiguous() or lr.device != position.device:
        raise RuntimeError(
            f"lr must be float32, contiguous and on the device of position, {position.device}, "
            f"got {lr.dtype} on {lr.device}"
        )


def _check_memory(call: _Call) -> None:
    """Raises ValueError or RuntimeError unless the kernels can walk all arrays in memory order."""
    check_params(call.params, "lrs_ext.functional.step")
    changing = [*call.states, *call.counters]
    if len(changing) != len(set(changing)):
        raise ValueError(
            "a state or a counter serves two parameters, which would both change it: make one for "
            "each, as in [torch.zeros(()) for _ in params]"
        )
    device, kept = call.position.device, call.kept
    for index, param in enumerate(call.params):
        if param.device != device:
            raise RuntimeError(
                f"parameters must be on the device of position, {device}, got {param.device}"
            )
        if not is_dense(param):
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)}, strides {param.stride()} has gaps "
                "between its elements: make it with .contiguous()"
            )
        for state in call.states[kept * index : kept * (index + 1)]:
            if not same_layout(state, param):
                raise RuntimeError(
                    f"a state has shape {tuple(state.shape)}, strides {state.stride()}, its "
                    f"parameter {tuple(param.shape)}, {param.stride()}: make it with zeros_like"
                )
