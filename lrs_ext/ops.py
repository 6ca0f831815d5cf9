"""The bridge to the native module: the only place that reads addresses or launches kernels."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lrs_ext import torch_functions
from lrs_ext.chunk_lengths import chunk_elements
from lrs_ext.grad_scaling import GradScaling
from lrs_ext.profiler_ranges import is_profiling, profile_range
from lrs_ext.shards import WHOLE, Spread

try:
    import lrs_ext._C as _C
except ImportError as error:
    raise ImportError(
        f"the native module of lrs_ext could not be loaded ({error}): install the project with "
        "`pip install .`; it needs a C++ compiler to build and libgomp to run. If it is installed, "
        f"its sources hide it: import it in another folder than {Path(__file__).parents[1]}"
    ) from error

if TYPE_CHECKING:
    from lrs_ext.profile_schedule import ProfileSchedule
    from lrs_ext.state_storage import Storage

KnownGroups = _C.KnownGroups
QUANT_BLOCK: int = _C.quant_block
CHANGED_WHILE_READ: str = _C.changed_while_read
PROFILES: tuple[str, ...] = tuple(_C.profiles)
COOLDOWNS: tuple[str, ...] = tuple(_C.cooldowns)
# The parameter of a profile that the native code calls its shape.
_SHAPES = ("d", "gamma", "delay", "power", "low", "decay")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def cuda_unavailable_reason(device: str) -> str | None:
    """Returns why the compiled kernels cannot serve tensors on `device`, None if they can."""
    if not _C.has_cuda:
        return (
            "lrs_ext was built without CUDA: no nvcc was found, or LRS_CUDA=0 was set; "
            "reinstall with the CUDA toolkit on the PATH and LRS_CUDA=1"
        )
    if torch.version.hip is not None:
        return "torch is built for ROCm; use the triton backend"
    if torch.device(device).type != "cuda":
        return f"it updates CUDA tensors, not {torch.device(device).type} ones"
    return str(_C.cuda_unavailable_reason()) or _missing_code(device)


def _missing_code(device: str) -> str | None:
    """Returns why the compiled kernels cannot run on a GPU, None if there is code for it."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return (
            f"{device} has compute capability {major}.{minor}, the compiled kernels need 8.0: use "
            "the triton backend"
        )
    compiled = [divmod(int(arch), 10) for arch in _C.cuda_architectures.split(",")]
    has_binary = any(major == m and minor >= n for m, n in compiled)
    if has_binary or (major, minor) >= max(compiled):  # the newest is there as PTX too
        return None
    return (
        f"{device} has compute capability {major}.{minor}, the kernels were built for "
        f"sm_{_C.cuda_architectures}: reinstall with LRS_CUDA_ARCHS={major}{minor}"
    )


def build_info() -> dict[str, str]:
    """Returns how the native module was built and which instruction set it runs."""
    cuda = "no"
    if _C.has_cuda:
        version = _C.cuda_runtime_version
        cuda = f"runtime {version // 1000}.{version % 1000 // 10}, sm_{_C.cuda_architectures}"
    return {"CPU instruction set": _C.cpu_instruction_set(), "CUDA kernels": cuda}


@functools.lru_cache(maxsize=1024)
def native_schedule(schedule: ProfileSchedule) -> _C.Schedule:
    """Returns the native twin of `schedule`: value(step), values(start, stop), fills."""
    sampling = schedule.sampling
    parameters: dict[str, Any] = dict(schedule.parameters)
    return _C.Schedule(
        profile=schedule.profile,
        lr=schedule.lr,
        min_lr=schedule.min_lr,
        total_steps=-1 if schedule.total_steps is None else schedule.total_steps,
        warmup_steps=schedule.warmup_steps,
        sampling=sampling if isinstance(sampling, int) else 1,
        fractions=sampling if isinstance(sampling, tuple) else (),
        shape=next((parameters[name] for name in _SHAPES if name in parameters), 0.0),
        milestones=parameters.get("milestones", ()),
        cooldown=parameters.get("cooldown", COOLDOWNS[0]),
    )


def fill_schedule(target: Tensor, schedule: ProfileSchedule) -> None:
    """Writes the values of updates 0, 1, ... to `target`, float32, contiguous, 1-d."""
    native = native_schedule(schedule)
    if target.device.type == "cpu":
        native.fill_cpu(target.data_ptr(), target.numel())
    elif cuda_unavailable_reason(str(target.device)) is None:
        points = _to_device(np.array(native.points, dtype=np.int64), target.device)
        native.fill_cuda(
            target=target.data_ptr(),
            count=target.numel(),
            points=points.data_ptr(),
            device=target.device.index,
            stream=torch.cuda.current_stream(target.device).cuda_stream,
        )
    else:
        host = torch.empty(target.shape, dtype=target.dtype, device="cpu")
        native.fill_cpu(host.data_ptr(), host.numel())
        target.copy_(_to_device(host.numpy(), target.device))


def fill_values(target: Tensor, values: NDArray[np.float64]) -> None:
    """Writes `values` to `target`, float32, 1-d, without waiting; the rest gets the last one."""
    count = min(len(values), target.numel())
    target[:count].copy_(_to_device(values[:count].astype(np.float32), target.device))
    target[count:].fill_(float(values[-1]))


@functools.cache
def _tensor_access() -> _C.TensorAccess:
    """Returns torch's functions for reading tensors."""
    access = _C.TensorAccess(**torch_functions.object_functions())
    direct = torch_functions.direct_functions()
    if direct is not None:
        with torch.inference_mode(False):
            probe = torch.zeros(2, 3, dtype=torch.float32, device="cpu", requires_grad=True)
            probe.grad = torch.zeros_like(probe)
            access.use_direct(direct, probe)
    return access


def has_memory(tensor: Tensor) -> bool:
    """Returns whether the elements of a strided tensor, if it has any, are in memory."""
    return tensor.numel() == 0 or tensor.is_meta or tensor.data_ptr() != 0


def memory_of(tensor: Tensor) -> int:
    """Returns a number that tensors have in common which share memory, 0 without any."""
    return tensor.untyped_storage().data_ptr()


def host_value(tensor: Tensor) -> float | None:
    """Returns the value of a one-element tensor in host memory, None for one on another device."""
    if tensor.device.type != "cpu":
        return None
    # Not item(): this is no wait, and must not look like one to those who trap them.
    address = 0 if tensor.is_neg() else tensor.data_ptr()
    if address and tensor.dtype == torch.float32:
        return ctypes.c_float.from_address(address).value
    if address and tensor.dtype == torch.float64:
        return ctypes.c_double.from_address(address).value
    return float(tensor)


def host_values(tensor: Tensor) -> list[float]:
    """Returns the values of a float64 tensor in host memory, contiguous, in no way that waits."""
    return [*(ctypes.c_double * tensor.numel()).from_address(tensor.data_ptr())]


_NOTHING_MOVES: Mapping[str, Tensor] = MappingProxyType({})


class GroupTable:
    """The parameter groups' hyper-parameters, where the step kernels read them.

    The address of `rows` does not change; writing a row does not wait for the device.
    """

    def __init__(self, groups: int, device: torch.device) -> None:
        self.rows = torch.zeros(groups, _C.group_bytes // 8, dtype=torch.int64, device=device)
        self._values: list[list[Tensor]] = [[] for _ in range(groups)]  # that the rows point to
        self._streams: set[int] = set()

    def stay_for(self, stream: int) -> None:
        """As `StepTable._stay_for`."""
        if stream not in self._streams:
            self._streams.add(stream)
            _record([self.rows, *itertools.chain.from_iterable(self._values)])

    def write(
        self,
        index: int,
        lr: Tensor,
        hyper: Mapping[str, float],
        moving: Mapping[str, Tensor] = _NOTHING_MOVES,
    ) -> None:
        """Writes row `index`.

        Args:
            lr: float32, contiguous: one value a step, the last one holds.
            hyper: the numbers that the update reads, by native name.
            moving: for "weight_decay" and "momentum" or "beta1", values as those of `lr`, in the
                place of the number.
        """
        row = self.rows[index]
        self._values[index] = [lr, *moving.values()]
        self._streams.clear()
        addresses = {name: (values.data_ptr(), values.numel()) for name, values in moving.items()}
        arguments = (row.data_ptr(), lr.data_ptr(), lr.numel(), dict(hyper), addresses)
        if row.device.type == "cpu":
            _C.write_group_cpu(*arguments)
        elif cuda_unavailable_reason(str(row.device)) is None:
            stream = torch.cuda.current_stream(row.device).cuda_stream
            _C.write_group_cuda(*arguments, row.device.index, stream)
        else:
            host = torch.empty(row.shape, dtype=row.dtype, device="cpu")
            _C.write_group_cpu(host.data_ptr(), *arguments[1:])
            row.copy_(_pinned(host.numpy(), row.device), non_blocking=True)


_UNSCALED = GradScaling()


class StepTable:
    """One step over every tensor of every group: tables of addresses, ready to launch.

    Args:
        backend: "cpu", "cuda" or "triton".
        algorithm: one of `_C.algorithms`.
        param_lists: the parameters of each group.
        positions: of the parameters, in order, among all of the optimizer.
        state: the optimizer's state.
        state_names: for each group, the keys of the arrays that the update reads.
        steps: each parameter's step counter, or None if it has no state and takes no part.
        groups: the hyper-parameters.
        step: int64, 0-d: committed updates.
        storage: how the states and bfloat16 parameters are kept.
        spread: over which ranks the parameters' elements are spread, of which these are a part.
        label: of a step, in a profile.
    """

    def __init__(
        self,
        *,
        backend: str,
        algorithm: str,
        param_lists: list[list[Tensor]],
        positions: list[int],
        state: dict[Tensor, dict[str, Any]],
        state_names: list[list[str]],
        steps: Sequence[Tensor | None],
        groups: GroupTable,
        step: Tensor,
        storage: Storage,
        spread: Spread = WHOLE,
        label: str = "lrs_ext::step",
    ) -> None:
        self.spread = spread
        self._label = label
        self.backend = backend
        self.algorithm = algorithm
        self.groups = groups
        self.step = step
        self._tensors = _C.StepTensors(
            _tensor_access(),
            param_lists,
            state,
            state_names,
            list(steps),
            storage.state_type,
            positions,
        )
        params = itertools.chain.from_iterable(param_lists)
        elements = sum(p.numel() for p, s in zip(params, steps, strict=True) if s is not None)
        bandwidth = _C.memory_bandwidth(step.device.index or 0) if backend == "cuda" else 0.0
        self._chunk_elements = chunk_elements(
            backend, algorithm, storage.state_type, elements, bandwidth
        )
        self._storage = storage
        self._native = _C.Step(
            algorithm,
            self._tensors,
            self._chunk_elements,
            storage.state_type,
            storage.stochastic_rounding,
        )
        self._native.bind(groups.rows.data_ptr(), step.data_ptr())
        self._held: list[Tensor | None] | None = None  # gradients that only we keep alive
        self._scaling: GradScaling | None = None  # of the last step
        tickets = 1
        if algorithm == "lamb":
            tensors = len(self._native.tensor_rows)
            sums = len(self._native.chunk_rows) + tensors
            self._squares = torch.zeros(sums, 2, dtype=torch.float64, device=step.device)
            self._native.bind_squares(self._squares.data_ptr())
            tickets += tensors
        if backend != "cpu":
            self._bind_device(tickets)

    def _bind_device(self, tickets: int) -> None:
        """Copies the tables to the device."""
        device = self.step.device
        self._rows = _to_device(self._native.tensor_rows, device)
        self._chunks = _to_device(self._native.chunk_rows, device)
        self._ticket = torch.zeros(tickets, dtype=torch.int32, device=device)
        self._native.bind_device(
            self._rows.data_ptr(), self._chunks.data_ptr(), self._ticket.data_ptr()
        )
        self._addresses = self._native.gradient_addresses
        self._gradients = _to_device(self._addresses, device)
        self._streams: set[int] = set()  # that have launched with the present tables
        self._captured_addresses: list[Tensor] = []
        self._spare_addresses: Tensor | None = None

    def refresh(
        self,
        param_lists: list[list[Tensor]],
        state: dict[Tensor, dict[str, Any]],
        gradients: list[Tensor | None] | None = None,
    ) -> bool:
        """Collects the gradients for the next `run`.

        Returns:
            False if the table is out of date: parameters, states or addresses have changed, or a
            gradient (the parameter's own unless `gradients` are given) differs from its parameter
            in device, dtype, shape or layout.
        """
        self._held = gradients
        return self._tensors.refresh(param_lists, state, gradients)

    @property
    def has_gradients(self) -> bool:
        return self._tensors.has_gradients

    def grad_norm(self) -> Tensor:
        """Returns the 2-norm of all gradients as they are stored: float32, 0-d, without waiting."""
        with profile_range(f"lrs_ext::grad_norm[{self.backend}]"):
            norm = self._grad_norm()
        self._held = None
        return norm

    def _grad_norm(self) -> Tensor:
        norm = torch.empty((), dtype=torch.float32, device=self.step.device)
        if self.backend == "cpu":
            self._native.grad_norm_cpu(norm.data_ptr(), torch.get_num_threads())
            return norm
        sums = torch.empty(max(len(self._chunks), 1), dtype=torch.float64, device=norm.device)
        if self.backend == "cuda":
            self._stay_for(self._native.grad_norm_cuda(sums.data_ptr(), norm.data_ptr()))
        else:
            from lrs_ext import triton_norm

            triton_norm.grad_norm(
                tensors=self._rows,
                chunks=self._chunks,
                gradients=self._device_gradients(),
                sums=sums,
                norm=norm,
                ticket=self._ticket,
                chunk_elements=self._chunk_elements,
            )
            self._after_triton()
        return norm

    def run(self, scaling: GradScaling | None = None, commits_step: bool = True) -> None:
        """Updates every tensor that has a gradient, without waiting.

        Args:
            commits_step: whether the schedules advance.
        """
        if scaling is not self._scaling:
            self._scale(scaling or _UNSCALED)
            self._scaling = scaling
        if is_profiling():
            with torch.autograd.profiler.record_function(self._label):
                self._launch(commits_step)
        else:
            self._launch(commits_step)
        self._held = None
        # Autograd refuses to go back through a graph whose parameters have changed since.
        if not self._tensors.count_update():
            torch.autograd.graph.increment_version(self._tensors.updated_params())

    def _launch(self, commits_step: bool, passes: str = "both") -> None:
        if self.algorithm == "lamb" and self.spread.groups and passes == "both":
            self._launch_passes(commits_step)
        elif self.backend == "cpu":
            self._native.run_cpu(torch.get_num_threads(), commits_step)
        elif self.backend == "cuda":
            self._stay_for(self._native.run_cuda(commits_step))
        else:
            self._run_triton(commits_step, passes)

    def _launch_passes(self, commits_step: bool) -> None:
        """Completes the sums of squares of each tensor's parts between the two passes of LAMB."""
        squares = self._squares[-len(self._native.tensor_rows) :]
        squares.zero_()  # no chunk writes the sums of an empty part
        for passes in ("moments", "params"):
            self._native.choose_passes(passes)
            self._launch(commits_step, passes)
            if passes == "moments":
                self.spread.sum_(squares)

    def _scale(self, scaling: GradScaling) -> None:
        for tensor in scaling.tensors():
            if tensor is not None and (
                tensor.dtype != torch.float32 or tensor.device != self.step.device
            ):
                raise RuntimeError(
                    "a gradient's scale, overflow or norm must be float32 on the parameters' "
                    f"device {self.step.device}, got {tensor.dtype} on {tensor.device}"
                )
        addresses = [0 if t is None else t.data_ptr() for t in scaling.tensors()]
        self._native.scale_gradients(
            loss_scale=addresses[0],
            found_inf=addresses[1],
            norm=addresses[2],
            max_norm=addresses[3],
        )

    def _device_gradients(self) -> Tensor:
        addresses = self._native.gradient_addresses
        if self._is_being_captured():
            return self._captured(addresses).to(self.step.device, non_blocking=True)
        if self._spare_addresses is None:
            self._spare_addresses = _pinned(np.empty_like(addresses), self.step.device)
        if not np.array_equal(addresses, self._addresses):
            self._addresses = addresses
            self._gradients = _to_device(addresses, self.step.device)
            self._streams.clear()
        return self._gradients

    def _captured(self, addresses: NDArray[np.int64]) -> Tensor:
        """Returns the addresses in host memory, from which each replay copies, ours for good."""
        for captured in self._captured_addresses:
            if np.array_equal(captured.numpy(), addresses):
                return captured
        # In a capture, torch refuses to copy from memory that is not pinned, and may refuse to pin.
        spare, self._spare_addresses = self._spare_addresses, None
        if spare is None:
            spare = _pinned(np.empty_like(addresses), self.step.device)
        self._captured_addresses.append(spare.copy_(torch.from_numpy(addresses)))
        return spare

    def _is_being_captured(self) -> bool:
        return self.step.is_cuda and torch.cuda.is_current_stream_capturing()

    def _run_triton(self, commits_step: bool, passes: str) -> None:
        from lrs_ext import triton_kernels, triton_lamb

        tables: dict[str, Any] = {
            "tensors": self._rows,
            "groups": self.groups.rows,
            "chunks": self._chunks,
            "gradients": self._device_gradients(),
            "step": self.step,
            "ticket": self._ticket,
            "scaling": (self._scaling or _UNSCALED).tensors(),
            "chunk_elements": self._chunk_elements,
            "commits_step": commits_step,
        }
        if self.algorithm == "lamb":
            triton_lamb.step(**tables, squares=self._squares, passes=passes)
        else:
            triton_kernels.step(
                self.algorithm,
                **tables,
                state_type=self._storage.state_type,
                param_kind=self._storage.param_kind,
            )
        self._after_triton()

    def _after_triton(self) -> None:
        self._tensors.release_gradients()
        if self.step.is_cuda:
            self._stay_for(torch.cuda.current_stream(self.step.device).cuda_stream)

    def _stay_for(self, stream: int) -> None:
        """Keeps what is read, once it is let go of, until `stream`, the current one, has read it.

        It may come from another stream, to which its memory would go back at once.
        """
        self.groups.stay_for(stream)
        if stream not in self._streams:
            self._streams.add(stream)
            tables = [self._rows, self._chunks, self._ticket, self._gradients, self.step]
            _record([*tables, self._squares] if self.algorithm == "lamb" else tables)


def _record(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def _to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copies without waiting: the caching allocator keeps pinned memory until the copy is done."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "rows of the schedule buffer cannot be filled in the capture of a CUDA graph, whose "
            "replays would copy from memory that is somebody else's by then: fill them before"
        )
    return _pinned(array, device).to(device, non_blocking=True)


def _pinned(array: NDArray[Any], device: torch.device) -> Tensor:
    """Returns an array in host memory from which `device` can copy without waiting."""
    host = torch.from_numpy(array)
    return host if device.type == "cpu" else host.pin_memory()
