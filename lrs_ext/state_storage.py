"""How an optimizer keeps its states and low-precision parameters: what arrays, and of what kind."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lrs_ext import block_codes
from lrs_ext.layout import is_dense, laid_out_as, memory_order, same_layout
from lrs_ext.shards import is_dtensor, like, local, part_of
from lrs_ext.tensor_checks import checked_state, with_shape_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

STATE_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.uint8: "block8"}
REMAINDER = "master_remainder"
_SCALE_SUFFIX = "_scale"
_MEANS_OF_SQUARES = ("exp_avg_sq",)  # of which the root is kept

State = dict[str, Any]


@dataclass(frozen=True)
class Storage:
    """How states and bfloat16 parameters are kept.

    Attributes:
        state_dtype: float32; bfloat16; or uint8 for 8-bit floats with a scale for 128 elements.
        master_weights: whether a bfloat16 parameter is the high half of a float32, whose low half
            is a state.
        stochastic_rounding: whether bfloat16 parameters without a low half are rounded up or down
            at random, right on average.
    """

    state_dtype: torch.dtype = torch.float32
    master_weights: bool = False
    stochastic_rounding: bool = False

    def __post_init__(self) -> None:
        if self.state_dtype not in STATE_TYPES:
            raise ValueError(
                "state_dtype must be torch.float32, torch.bfloat16 or torch.uint8 (8-bit blocks), "
                f"got {self.state_dtype}"
            )
        if self.master_weights and self.stochastic_rounding:
            raise ValueError(
                "master_weights keeps what rounding takes away, so there is nothing for "
                "stochastic_rounding to do: choose one"
            )

    @property
    def state_type(self) -> str:
        return STATE_TYPES[self.state_dtype]

    @property
    def param_kind(self) -> str:
        if self.master_weights:
            return "split"
        return "stochastic" if self.stochastic_rounding else "nearest"

    def check(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Raises ValueError if parameters with states of these names cannot be kept so."""
        if len(names) > 2 and self.state_dtype != torch.float32:
            raise ValueError(
                f"{names[-1]} needs float32 states: use state_dtype=torch.float32 or no amsgrad"
            )
        if self != Storage() and any(param.dtype == torch.float16 for param in params):
            raise ValueError(
                "float16 parameters are rounded to nearest and have float32 states: leave "
                "state_dtype, master_weights and stochastic_rounding alone, or use bfloat16"
            )

    def arrays(self, param: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Returns, on the meta device, what is kept for a parameter, or this rank's part of it.

        Args:
            names: of the states.
        """
        arrays: dict[str, Tensor] = {}
        param = torch.empty_like(local(param), device="meta")
        for name in names:
            arrays |= self._zeros(param, name)
        if self._is_split(param):
            arrays[REMAINDER] = torch.zeros_like(param, dtype=torch.int16)
        return arrays

    def has_arrays(self, param: Tensor, names: Sequence[str]) -> bool:
        """Returns whether anything is kept for a parameter with states of these names."""
        return bool(names) or self._is_split(param)

    def complete(self, param: Tensor, state: State, names: Sequence[str]) -> bool:
        """Adds what is missing to a parameter's state, and converts what is of another kind.

        The arrays of a DTensor are DTensors in its placements; blocks are those of this rank. What
        somebody else keeps in the state stays as it is.

        Returns:
            Whether any state was missing.

        Raises:
            RuntimeError: a state has another shape than its parameter.
        """
        if any(isinstance(value, dict) for value in state.values()):  # a wrapper has put them there
            flat = flattened(state)
            state.clear()
            state.update(flat)
        if is_dtensor(param):
            own = {*names, REMAINDER}
            wholes = {n: v for n, v in state.items() if n in own and isinstance(v, Tensor)}
            parts = {n: part_of(param, with_shape_of(param, n, v)) for n, v in wholes.items()}
            completed = state | parts
            is_new = self.complete(local(param), completed, names)
            for name in state.keys() - completed.keys():
                del state[name]
            for name, value in completed.items():
                if name not in own:
                    state[name] = value
                elif value is not parts.get(name):
                    state[name] = like(param, value)
            return is_new
        is_new = False
        for name in names:
            if state.get(name) is None:
                is_new = True
                state.update(self._zeros(param, name))
            else:
                self._convert(param, state, name)
        if self._is_split(param):
            if state.get(REMAINDER) is None:
                state[REMAINDER] = torch.zeros_like(param, dtype=torch.int16)
            state[REMAINDER] = checked_state(param, REMAINDER, state[REMAINDER], torch.int16)
        return is_new

    def loaded(
        self,
        param: Tensor,
        saved: Mapping[str, Tensor],
        names: Sequence[str],
        kept: Container[str] = (),
    ) -> State:
        """Returns saved arrays of any kind as new tensors of this kind.

        Args:
            names: of the states that the update may have. Other tensors, which somebody else keeps
                in the state of a parameter, are copied as they are.
            kept: names of arrays that are to be returned themselves if they are of this kind, on
                any device.

        Raises:
            ValueError: an array does not have the shape of its parameter.
        """
        own = {*names, *(name + _SCALE_SUFFIX for name in names), REMAINDER}
        others = {n: v.to(param.device, copy=True) for n, v in saved.items() if n not in own}
        return others | self._loaded_own(param, {n: v for n, v in saved.items() if n in own}, kept)

    def _loaded_own(
        self, param: Tensor, saved: Mapping[str, Tensor], kept: Container[str]
    ) -> State:
        if is_dtensor(param):
            return self._loaded_parts(param, saved, kept)
        state: State = {}
        for name, value, scale in _saved_arrays(param, saved):
            if is_dtensor(value):
                raise ValueError(
                    f"the loaded {name} is a DTensor, its parameter is not: gather it with "
                    "get_optimizer_state_dict and StateDictOptions(full_state_dict=True) of "
                    "torch.distributed.checkpoint.state_dict"
                )
            if name == REMAINDER:
                if self._is_split(param):
                    is_kept = name in kept and value.dtype == torch.int16
                    is_kept = is_kept and same_layout(value, param)
                    state[name] = value if is_kept else laid_out_as(param, value, torch.int16)
                continue
            state[name] = value
            if scale is not None:
                blocks = block_codes.num_blocks(param.numel())
                if scale.shape != (blocks,):
                    raise ValueError(
                        f"the loaded {name + _SCALE_SUFFIX} has shape {tuple(scale.shape)}, its "
                        f"parameter {blocks} blocks: the checkpoint belongs to another model"
                    )
                scale = scale.to(param.device, torch.float32, copy=True)
                state[name + _SCALE_SUFFIX] = scale
            is_coded = self.state_dtype == torch.uint8
            is_of_this_kind = value.dtype == self.state_dtype and is_coded == (scale is not None)
            if name in kept and is_of_this_kind and same_layout(value, param):
                continue
            self._convert(param, state, name)
            if state[name] is value:
                state[name] = value.clone(memory_format=torch.preserve_format)
        return state

    def saved(self, param: Tensor, state: State) -> State:
        """Returns the state of a parameter for a checkpoint.

        8-bit codes and their scales become a dict under the name of the state, with which any
        optimizer that takes codes for numbers fails.

        8-bit blocks of a DTensor are cut from this rank's part, so that no others could read them:
        they become float32 DTensors, and their scales empty. Loading them into equal parts gives
        back the same blocks. Low halves become int32, which ranks can exchange; int16 they cannot.
        """
        if not is_dtensor(param):
            return _nested(state)
        saved = dict(state)
        for name, value in state.items():
            scale = state.get(name + _SCALE_SUFFIX)
            if scale is not None:
                numbers = block_codes.decode(local(value), scale, _is_root(name))
                saved[name], saved[name + _SCALE_SUFFIX] = like(param, numbers), scale.new_empty(0)
            elif name == REMAINDER:
                saved[name] = like(param, local(value).int())
        return saved

    def pack(
        self,
        param: Tensor,
        state: State,
        value: Tensor,
        numbers: Mapping[str, Tensor],
        random: Tensor,
    ) -> None:
        """Writes a parameter and its states in place, as the kernels do.

        Args:
            value: the parameter, float32.
            numbers: the states, float32.
            random: 16 random bits for each element in the order of memory, int64.
        """
        if _is_in_halves(param, state):
            bits = block_codes.bits_of(memory_order(value))
            bits = torch.where(_is_nan(bits), 0x7FC00000, bits)
            memory_order(state[REMAINDER]).copy_(_int16(bits & 0xFFFF))
            memory_order(param).view(torch.int16).copy_(_int16((bits + 0x8000) >> 16))
        elif self.stochastic_rounding and param.dtype == torch.bfloat16:
            _round_stochastically(param, value, random)
        else:
            param.copy_(value)
        for name, number in numbers.items():
            if state[name].dtype == torch.uint8:
                codes, scales = block_codes.encode(number, _is_root(name), random)
                state[name].copy_(codes)
                state[name + _SCALE_SUFFIX].copy_(scales)
            elif state[name].dtype == torch.bfloat16:
                _round_stochastically(state[name], number, random)
            else:
                state[name].copy_(number)

    def _loaded_parts(
        self, param: DTensor, saved: Mapping[str, Tensor], kept: Container[str]
    ) -> State:
        """Returns as DTensors what was saved of DTensors or, equal on all ranks, of whole ones."""
        parts = {}
        for name, value, scale in _saved_arrays(param, saved):
            if scale is not None:
                value = block_codes.decode(value, scale.to(value.device), _is_root(name))
            parts[name] = part_of(param, value)
        state = self._loaded_own(local(param), parts, kept)
        for name, part in state.items():
            if not name.endswith(_SCALE_SUFFIX):
                is_kept = part is local(saved[name])
                state[name] = saved[name] if is_kept else like(param, part)
        return state

    def _convert(self, param: Tensor, state: State, name: str) -> None:
        """Makes an array of a parameter's state what the kernels need, if it is not already."""
        value, scale = state[name], state.get(name + _SCALE_SUFFIX)
        if scale is not None and not (
            self.state_dtype == torch.uint8 and same_layout(value, param)
        ):
            codes = value if is_dense(value) else value.contiguous()
            value = block_codes.decode(codes, scale.to(codes.device), _is_root(name))
            del state[name + _SCALE_SUFFIX]
            scale = None
        if self.state_dtype == torch.uint8 and scale is None:
            values = checked_state(param, name, value, torch.float32)
            codes, scales = block_codes.encode_nearest(values, _is_root(name))
            state[name], state[name + _SCALE_SUFFIX] = codes, scales
            return
        state[name] = checked_state(param, name, value, self.state_dtype)
        if scale is not None:
            state[name + _SCALE_SUFFIX] = scale.to(param.device, torch.float32).contiguous()

    def _zeros(self, param: Tensor, name: str) -> dict[str, Tensor]:
        zeros = {name: torch.zeros_like(param, dtype=self.state_dtype)}
        if self.state_dtype == torch.uint8:
            blocks = block_codes.num_blocks(param.numel())
            scales = torch.zeros(blocks, dtype=torch.float32, device=param.device)
            zeros[name + _SCALE_SUFFIX] = scales
        return zeros

    def _is_split(self, param: Tensor) -> bool:
        return self.master_weights and param.dtype == torch.bfloat16


def _saved_arrays(
    param: Tensor, saved: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yields name, array and, for the codes of 8-bit blocks, scales of what a checkpoint has.

    Raises:
        ValueError: an array does not have the shape of its parameter.
    """
    for name, value in saved.items():
        if name.endswith(_SCALE_SUFFIX) and name.removesuffix(_SCALE_SUFFIX) in saved:
            continue
        if value.shape != param.shape:
            raise ValueError(
                f"the loaded {name} has shape {tuple(value.shape)}, its parameter "
                f"{tuple(param.shape)}: the checkpoint belongs to another model"
            )
        # Numbers may come with empty scales: see `Storage.saved`.
        yield name, value, saved.get(name + _SCALE_SUFFIX) if value.dtype == torch.uint8 else None


def _nested(state: State) -> State:
    nested = dict(state)
    for name in [name for name in state if state.get(name + _SCALE_SUFFIX) is not None]:
        nested[name] = {"codes": state[name], "scale": nested.pop(name + _SCALE_SUFFIX)}
    return nested


def flattened(saved: Mapping[str, Any]) -> State:
    """Returns a state that was saved for a checkpoint with each scale beside its codes.

    Flat distributed checkpoints make an empty dict of a scale that has no entry of its own.
    """
    state: State = {}
    for name, value in saved.items():
        if not isinstance(value, dict):
            state[name] = value
        elif value.keys() == {"codes", "scale"}:
            state[name], state[name + _SCALE_SUFFIX] = value["codes"], value["scale"]
        elif value:  # somebody else's
            state[name] = value
    return state


def _is_in_halves(param: Tensor, state: Mapping[str, Any]) -> bool:
    # A parameter that has become float32 since has a low half that nobody reads.
    return REMAINDER in state and param.dtype == torch.bfloat16


def unpacked_param(param: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """Returns a parameter as float32, with its low half if it has one; itself if it is float32."""
    if not _is_in_halves(param, state):
        return param.float()
    value = torch.empty_like(param, dtype=torch.float32)
    high = memory_order(param).view(torch.int16).long() << 16
    bits = high + memory_order(state[REMAINDER]).long()
    memory_order(value).view(torch.int32).copy_(_int32(bits & 0xFFFFFFFF))
    return value


def unpacked(state: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Returns the states of these names as float32 numbers, in new tensors unless they are so."""
    numbers = {}
    for name in names:
        scale = state.get(name + _SCALE_SUFFIX)
        if scale is None:
            numbers[name] = state[name].float()
        else:
            numbers[name] = block_codes.decode(state[name], scale, _is_root(name))
    return numbers


def _is_nan(bits: Tensor) -> Tensor:
    return (bits & 0x7FFFFFFF) > 0x7F800000


def _round_stochastically(target: Tensor, values: Tensor, random: Tensor) -> None:
    """Writes float32 values to a bfloat16 target; `random` has 16 random bits for each."""
    bits = block_codes.bits_of(memory_order(values))
    bits = torch.where(_is_nan(bits), 0x7FFF, (bits + random) >> 16)
    memory_order(target).view(torch.int16).copy_(_int16(bits))


def _int16(bits: Tensor) -> Tensor:
    """Returns words below 2^16 as the int16 of the same bits."""
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16)


def _int32(bits: Tensor) -> Tensor:
    return torch.where(bits >= 0x80000000, bits - 0x100000000, bits).to(torch.int32)


def _is_root(name: str) -> bool:
    return name in _MEANS_OF_SQUARES
