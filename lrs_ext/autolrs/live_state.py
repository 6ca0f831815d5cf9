"""What makes up the training state, and how it is read and written where it lives."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lrs_ext.param_devices import params_of
from lrs_ext.scheduled_optimizer import ScheduledOptimizer
from lrs_ext.shards import local

Access = tuple[Callable[[], Any], Callable[[Any], object]]  # to a state: how it is got and set
SCHEDULE_STEP = "schedule step"


class LiveState:
    """What is trained, with a name for each tensor that every process gives it.

    The first word of a name says what it is: a parameter, a buffer, a cache (a buffer that is in no
    checkpoint), a state or counter of the optimizer, or the schedule.

    Args:
        model: parameters, buffers, and what its ``get_extra_state`` returns.
        optimizer: its state, and parameters that the model does not have.
        extra_state: objects with ``state_dict`` and ``load_state_dict``.

    Raises:
        TypeError: an extra object has no ``state_dict`` or ``load_state_dict``.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, extra_state: Sequence[Any]
    ) -> None:
        for extra in extra_state:
            if not (hasattr(extra, "state_dict") and hasattr(extra, "load_state_dict")):
                raise TypeError(
                    "extra_state must have objects with state_dict and load_state_dict, got "
                    f"{type(extra).__name__}"
                )
        self._model, self._optimizer = unwrapped_model(model), optimizer
        self._extra_state = dict(enumerate(extra_state))

    @property
    def params(self) -> list[Tensor]:
        """Those of the optimizer."""
        return params_of(self._optimizer.param_groups)

    def leave(self, extra: Any) -> None:
        """Leaves an object of `extra_state` out from now on."""
        self._extra_state = {i: kept for i, kept in self._extra_state.items() if kept is not extra}

    def tensors(self) -> dict[str, Tensor]:
        """Returns everything that is copied in place; parameters on several ranks as DTensors.

        Raises:
            ValueError: a tensor is sparse.
        """
        for module in self._modules().values():
            reshard(module)
        tensors = {name: tensor.detach() for name, tensor in self._named().items()}
        check_dense(tensors)
        return tensors

    def trained(self) -> set[str]:
        """Returns the names of the optimizer's parameters."""
        params = set(self.params)
        return {name for name, tensor in self._named().items() if tensor in params}

    def frozen(self) -> set[str]:
        """Returns the names of parameters that the optimizer cannot change, nor any other.

        They require no gradient. Those of modules in `extra_state` are named there to be copied.
        """
        extra = (e for e in self._extra_state.values() if isinstance(e, nn.Module))
        changing = {*self.params, *(param for module in extra for param in module.parameters())}
        return {
            name
            for name, tensor in self._named().items()
            if kind(name) == "parameter" and not tensor.requires_grad and tensor not in changing
        }

    def local_tensors(self) -> dict[str, Tensor]:
        """Returns this rank's part of `tensors`."""
        return {name: local(tensor) for name, tensor in self.tensors().items()}

    def extras(self) -> dict[int | str, Access]:
        """Returns access to all states that are not copied in place."""
        extras: dict[int | str, Access] = {
            index: access(extra)
            for index, extra in self._extra_state.items()
            if not is_plain_module(extra)
        }
        for owner, module in self._modules().items():
            for path, part in module.named_modules():
                if type(part).get_extra_state is not nn.Module.get_extra_state:
                    extras[f"{owner}{path}"] = (part.get_extra_state, part.set_extra_state)
        return extras

    def extra_states(self) -> dict[int | str, Any]:
        """Returns the states that `extras` has access to."""
        return {key: get_state() for key, (get_state, _) in self.extras().items()}

    def homes(self, names: Iterable[str]) -> dict[str, torch.device]:
        """Returns the device of the parameter that each name belongs to, else of the first one."""
        devices = [param.device for param in self.params]
        of_param = ("state", "counter")
        return {name: devices[param_index(name) if kind(name) in of_param else 0] for name in names}

    def places(self, names: Sequence[str]) -> list[tuple[dict[str, Any], str, str]]:
        """Returns what has each buffer or state of these names, its key there, and the name."""
        modules, params = self._modules(), self.params
        found: list[tuple[dict[str, Any], str, str]] = []
        for name in names:
            _, _, path = name.partition(" ")
            if kind(name) == "state":
                index, _, key = path.partition(" ")
                found.append((self._optimizer.state[params[int(index)]], key, name))
            elif kind(name) in ("buffer", "cache"):
                owner = max((o for o in modules if path.startswith(o)), key=len)
                module, _, key = path.removeprefix(owner).rpartition(".")
                found.append((modules[owner].get_submodule(module)._buffers, key, name))
        return found

    def _named(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        own: set[Tensor] = set()
        for owner, module in self._modules().items():
            for name, tensor in module_tensors(module, owner):
                if tensor not in own:
                    own.add(tensor)
                    tensors[name] = tensor
        for index, param in enumerate(self.params):
            if param not in own:
                tensors[f"parameter optimizer[{index}]"] = param
        tensors.update(state_entries(self._optimizer, True))
        if isinstance(self._optimizer, ScheduledOptimizer):
            tensors[SCHEDULE_STEP] = self._optimizer.schedule_buffer.step
            for index, param in enumerate(self.params):
                if param in self._optimizer.step_counters:
                    tensors[f"counter {index}"] = self._optimizer.step_counters[param]
        return tensors

    def _modules(self) -> dict[str, nn.Module]:
        """Returns the modules that are copied in place, by what comes before their names."""
        modules = {"": self._model}
        for index, extra in self._extra_state.items():
            if is_plain_module(extra):
                modules[f"extra_state[{index}]."] = extra
        return modules


def kind(name: str) -> str:
    """Returns the first word of a name of `LiveState`."""
    return name.partition(" ")[0]


def param_index(name: str) -> int:
    """Returns which of the optimizer's parameters a state or counter belongs to."""
    return int(name.split(" ")[1])


def state_entries(optimizer: torch.optim.Optimizer, are_tensors: bool) -> Iterator[tuple[str, Any]]:
    """Yields the entries of the optimizer's state: its tensors, or all that is none."""
    for index, param in enumerate(params_of(optimizer.param_groups)):
        for key, value in optimizer.state.get(param, {}).items():
            if isinstance(value, Tensor) == are_tensors:
                yield f"state {index} {key}", value


def state_to_come(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns, on the meta device, the state that the optimizer will have after its first update.

    A twin of it makes a step with parameters of the same shapes that have no memory. Where that
    does not work, nothing is returned, with a warning.
    """
    if isinstance(optimizer, ScheduledOptimizer):
        return {
            f"state {index} {name}": array
            for index, arrays in enumerate(optimizer.state_to_come())
            for name, array in arrays.items()
        }
    twin = copy.copy(optimizer)
    twin.state = type(optimizer.state)(dict)
    twin.param_groups = []
    plain = {"lr": 0.0, "foreach": False, "fused": False, "capturable": False}
    for group in optimizer.param_groups:
        params = [torch.empty_like(local(param), device="meta") for param in group["params"]]
        for param in params:
            param.grad = torch.empty_like(param)
        overrides = {name: value for name, value in plain.items() if name in group}
        twin.param_groups.append({**group, **overrides, "params": params})
    try:
        with torch.no_grad():
            type(optimizer).step.__wrapped__(twin)  # type: ignore[attr-defined]  # without hooks
    except Exception as error:  # whatever an optimizer may do with tensors without memory
        warnings.warn(
            f"what {type(optimizer).__name__} will keep for each parameter cannot be foretold "
            f"({error}): the copy of it takes memory only when it is there",
            stacklevel=4,
        )
    return dict(state_entries(twin, True))


def check_dense(tensors: dict[str, Tensor]) -> None:
    """Raises ValueError if a tensor is sparse, which cannot be put back into the same memory."""
    ways_out = {
        "buffer": "keep a constant one as a plain attribute of its module, not as a buffer, or "
        "register its indices and values as buffers of their own",
        "parameter": "make it dense",
        "state": "make the gradients dense (sparse=False in an embedding), or take an optimizer "
        "whose state is dense, such as torch.optim.SparseAdam",
    }
    ways_out["cache"] = ways_out["buffer"]
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ValueError(
                f"{name} has layout {tensor.layout}, AutoLRS can roll back dense tensors only: "
                f"{ways_out[kind(name)]}"
            )


def module_tensors(module: nn.Module, owner: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters and buffers of a module with their names; `owner` is a part of them."""
    for name, param in module.named_parameters():
        yield f"parameter {owner}{name}", param
    for path, part in module.named_modules():
        for key, buffer in part._buffers.items():
            if buffer is not None:
                word = "cache" if key in part._non_persistent_buffers_set else "buffer"
                yield f"{word} {owner}{path}{'.' if path else ''}{key}", buffer


def unwrapped_model(model: nn.Module) -> nn.Module:
    """Returns what DistributedDataParallel and torch.compile have been put around.

    So names are the same on any number of ranks, as torch.distributed.checkpoint has them.
    """
    while True:
        is_parallel = isinstance(model, DistributedDataParallel)
        inner = model._modules.get("module" if is_parallel else "_orig_mod")
        if inner is None:
            return model
        model = inner


def reshard(module: nn.Module) -> None:
    """Frees what FSDP has gathered, as after a forward pass without a backward one.

    Until then modules have whole parameters in the place of those that the optimizer updates.
    """
    for part in module.modules():
        if callable(getattr(type(part), "reshard", None)):
            part.reshard()  # type: ignore[operator]


def is_plain_module(extra: Any) -> bool:
    """Returns whether an object is a module whose state is in its parameters and buffers."""
    return (
        isinstance(extra, nn.Module)
        and type(extra).state_dict is nn.Module.state_dict
        and type(extra).load_state_dict is nn.Module.load_state_dict
    )


def is_scaler(extra: Any) -> bool:
    """Returns whether an object is a GradScaler that scales; one that does not has no tensors."""
    return isinstance(extra, torch.amp.GradScaler) and extra.is_enabled()


def access(extra: Any) -> Access:
    """Returns access to an object's state, without waiting: a GradScaler's own reads its scale."""
    if not is_scaler(extra):
        return extra.state_dict, extra.load_state_dict

    names = ("scale", "growth_tracker")  # None until the scaler is used; it starts from init_...

    def get_state() -> dict[str, Any]:
        return {name: getattr(extra, f"_{name}") for n in names for name in (n, f"init_{n}")}

    def set_state(state: dict[str, Any]) -> None:
        for name, saved in state.items():
            live = getattr(extra, f"_{name}")
            if isinstance(live, Tensor) and isinstance(saved, Tensor):
                live.copy_(saved, non_blocking=True)
            elif isinstance(live, Tensor):
                live.fill_(state[f"init_{name}"])
            else:
                moved = saved.to(extra._device) if isinstance(saved, Tensor) else saved
                setattr(extra, f"_{name}", moved)

    return get_state, set_state


def restore_tensors_where(bad: Tensor, live: Any, saved: Any) -> None:
    """Restores, in place, the tensors that two states have at the same place."""
    if isinstance(live, Tensor) and isinstance(saved, Tensor) and is_like(live, saved):
        live.copy_(torch.where(bad.to(live.device), saved.to(live.device), live))
    elif isinstance(live, dict) and isinstance(saved, dict):
        for name in live.keys() & saved.keys():
            restore_tensors_where(bad, live[name], saved[name])
    elif isinstance(live, (list, tuple)) and isinstance(saved, (list, tuple)):
        for first, second in zip(live, saved, strict=False):
            restore_tensors_where(bad, first, second)


def share_memory(first: Any, second: Any) -> bool:
    """Returns whether two states of one object have their floating-point tensors at one place."""
    pairs = zip(tensors_in(first), tensors_in(second), strict=True)
    return all(local(a).is_set_to(local(b)) for a, b in pairs if a.is_floating_point())


def tensors_in(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (dict, list, tuple)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from tensors_in(value)


def copied(state: Any, live: Any = None) -> Any:
    """Returns a copy of a nested state; its tensors go to the device of their likes in `live`.

    Those without one stay on their device.
    """
    if isinstance(state, Tensor):
        device = live.device if isinstance(live, Tensor) else state.device
        return state.detach().to(device, copy=True)
    if isinstance(state, dict):
        parts = live if isinstance(live, dict) else {}
        return {name: copied(value, parts.get(name)) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        parts = dict(enumerate(live)) if isinstance(live, (list, tuple)) else {}
        copies = [copied(value, parts.get(index)) for index, value in enumerate(state)]
        return copies if isinstance(state, list) else tuple(copies)
    return copy.deepcopy(state)


def is_like(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype
