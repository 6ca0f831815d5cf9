from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

has_cuda: bool
cuda_runtime_version: int
cuda_architectures: str
group_bytes: int
quant_block: int
changed_while_read: str
profiles: list[str]
cooldowns: list[str]
algorithms: list[str]

class Schedule:
    def __init__(
        self,
        *,
        profile: str,
        lr: float,
        min_lr: float,
        total_steps: int,
        warmup_steps: int,
        sampling: int,
        fractions: Sequence[float],
        shape: float,
        milestones: Sequence[float],
        cooldown: str,
    ) -> None: ...
    def value(self, step: int) -> float: ...
    def values(self, start: int, stop: int) -> NDArray[np.float64]: ...
    def fill_cpu(self, target: int, count: int) -> None: ...
    def fill_cuda(
        self, *, target: int, count: int, points: int, device: int, stream: int
    ) -> None: ...
    @property
    def points(self) -> list[int]: ...

class TensorAccess:
    def __init__(
        self,
        exchange_api: object,
        make_handles: Callable[[list[Any]], list[Any]],
        data_pointer: int,
        delete_handle: int,
        is_negated: Callable[[Any], bool],
        plain_types: tuple[type, ...],
        has_function_mode: Callable[[], bool],
    ) -> None: ...
    def use_direct(self, functions: dict[str, int], probe: Any) -> bool: ...
    @property
    def is_direct(self) -> bool: ...

class StepTensors:
    def __init__(
        self,
        access: TensorAccess,
        param_lists: list[Any],
        state: dict[Any, Any],
        state_names: list[Any],
        steps: list[Any],
        state_type: str = "float32",
        positions: Sequence[int] = (),
    ) -> None: ...
    def refresh(
        self, param_lists: list[Any], state: dict[Any, Any], gradients: list[Any] | None
    ) -> bool: ...
    def release_gradients(self) -> None: ...
    @property
    def has_gradients(self) -> bool: ...
    def count_update(self) -> bool: ...
    def updated_params(self) -> list[Any]: ...

class KnownGroups:
    def look_at(self, groups: list[dict[str, Any]], schedules: list[Any]) -> None: ...
    def confirm(self) -> None: ...
    def forget(self) -> None: ...
    def are_unchanged(self, groups: list[dict[str, Any]], schedules: list[Any]) -> bool: ...
    def change(self, groups: list[dict[str, Any]], change: Callable[[], object]) -> None: ...
    def put(self, groups: list[dict[str, Any]], key: str, values: list[Any]) -> None: ...

class Step:
    def __init__(
        self,
        algorithm: str,
        tensors: StepTensors,
        chunk_elements: int,
        state_type: str = "float32",
        rounds_stochastically: bool = False,
    ) -> None: ...
    def bind(self, groups: int, step: int) -> None: ...
    def bind_squares(self, squares: int) -> None: ...
    def choose_passes(self, passes: str) -> None: ...
    def bind_device(self, tensors: int, chunks: int, ticket: int) -> None: ...
    def scale_gradients(
        self, *, loss_scale: int, found_inf: int, norm: int, max_norm: int
    ) -> None: ...
    @property
    def tensor_rows(self) -> NDArray[np.int64]: ...
    @property
    def chunk_rows(self) -> NDArray[np.int32]: ...
    @property
    def gradient_addresses(self) -> NDArray[np.int64]: ...
    def run_cpu(self, num_threads: int, commits_step: bool = True) -> None: ...
    def run_cuda(self, commits_step: bool = True) -> None: ...
    def grad_norm_cpu(self, norm: int, num_threads: int) -> None: ...
    def grad_norm_cuda(self, sums: int, norm: int) -> None: ...

def write_group_cpu(
    target: int,
    lr: int,
    capacity: int,
    scale: float,
    hyper: Mapping[str, float],
    moving: Mapping[str, tuple[int, int]] = ...,
) -> None: ...
def write_group_cuda(
    target: int,
    lr: int,
    capacity: int,
    scale: float,
    hyper: Mapping[str, float],
    moving: Mapping[str, tuple[int, int]],
    device: int,
    stream: int,
) -> None: ...
def memory_bandwidth(device: int) -> float: ...
def cuda_unavailable_reason() -> str: ...
def cpu_instruction_set() -> str: ...
def chunk_ranges(
    numel: int, chunk_elements: int, lane: int, addresses: Sequence[int], bytes: Sequence[int]
) -> list[tuple[int, int, int, int]]: ...
