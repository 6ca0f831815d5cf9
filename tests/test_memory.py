"""What steps and checkpoints take in memory beside parameters, gradients and states."""

import copy
import gc

import cases
import pytest
import torch
from test_checkpoint import params_of, through_file
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import lrs_ext
from lrs_ext import block_codes

SIZE = 1 << 16  # of each parameter
storages = pytest.mark.parametrize("storage", cases.STORAGES, ids=str)


class Memory(TorchDispatchMode):
    """The most bytes that tensors which are made in it take at a time."""

    def __init__(self):
        super().__init__()
        self.peak = 0
        self._made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {*map(storage_of, tensors_in((args, kwargs)))}
        for tensor in tensors_in(result):
            if storage_of(tensor) not in given:
                storage = tensor.untyped_storage()
                self._made[storage_of(tensor)] = (StorageWeakRef(storage), storage.nbytes())
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._made.values()))
        return result


def tensors_in(tree):
    leaves = tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not leaf.is_meta]


def storage_of(tensor):
    return tensor.untyped_storage()._cdata


def memory_of(function, *args):
    """The most bytes that the call takes, for each element of a parameter."""
    with Memory() as memory:
        function(*args)
    return memory.peak / SIZE


def make(storage, num_params=4, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(SIZE, generator=generator).bfloat16() for _ in range(num_params)]
    model = torch.nn.ParameterList(torch.nn.Parameter(value.to(device)) for value in values)
    return model, lrs_ext.AdamW(model, lrs_ext.rex(0.1, 8), **storage.options)


def update(model, opt, k):
    generator = torch.Generator().manual_seed(k)
    for param in model:
        param.grad = torch.randn(SIZE, generator=generator).to(param.device, torch.bfloat16)
    opt.step()


def trained(storage, num_params=4, device="cpu"):
    model, opt = make(storage, num_params, device)
    for k in range(2):
        update(model, opt, k)
    return model, opt


def arrays_of(opt):
    states = [opt.state[param] for param in params_of(opt)]
    return [state[name] for state in states for name in sorted(state)]


@storages
def test_a_step_takes_nothing_once_the_states_are_there(storage):
    _, opt = trained(storage)
    assert memory_of(opt.step) == 0
    assert memory_of(lrs_ext.clip_grad_norm_, opt, 1.0) < 0.01
    assert memory_of(opt.step) == 0


def test_a_step_of_a_parameter_with_gaps_copies_its_gradient_only():
    param = torch.nn.Parameter(torch.ones(SIZE, 2)[:, 0])
    opt = lrs_ext.AdamW([param], lr=0.1)
    param.grad = torch.ones(SIZE)
    opt.step()
    assert memory_of(opt.step) == pytest.approx(4, abs=0.01)


@storages
def test_a_checkpoint_is_loaded_into_states_without_a_copy_of_them(storage):
    model, opt = trained(storage)
    checkpoint = through_file(opt.state_dict())
    before = [array.clone() for array in arrays_of(opt)]
    update(model, opt, 2)
    assert memory_of(opt.load_state_dict, checkpoint) < 1
    assert all(map(torch.equal, arrays_of(opt), before))


@pytest.mark.gpu
@storages
def test_a_checkpoint_in_host_memory_is_loaded_into_states_on_a_gpu(storage):
    model, opt = trained(storage, device="cuda")
    before = [array.cpu() for array in arrays_of(opt)]
    checkpoint = copy.deepcopy(opt.state_dict())
    for state in checkpoint["state"].values():
        state.update(tree_map(torch.Tensor.cpu, state))
    update(model, opt, 2)
    assert memory_of(opt.load_state_dict, checkpoint) < 1
    assert all(torch.equal(a.cpu(), b) for a, b in zip(arrays_of(opt), before, strict=True))


@storages
def test_a_distributed_checkpoint_is_loaded_into_states_without_a_copy_of_them(storage):
    model, opt = trained(storage)
    states = get_optimizer_state_dict(model, opt)
    before = [array.clone() for array in arrays_of(opt)]
    assert memory_of(set_optimizer_state_dict, model, opt, states) < 1
    assert all(map(torch.equal, arrays_of(opt), before))


@storages
def test_a_new_optimizer_gets_one_copy(storage):
    _, opt = trained(storage)
    checkpoint = through_file(opt.state_dict())
    held = sum(array.nbytes for array in arrays_of(opt)) / SIZE
    _, other = make(storage)
    assert memory_of(other.load_state_dict, checkpoint) < held + 1
    for array, loaded in zip(arrays_of(opt), arrays_of(other), strict=True):
        assert torch.equal(array, loaded)
    saved = [*map(storage_of, tensors_in(checkpoint))]
    assert not {*saved} & {*map(storage_of, arrays_of(other))}


@storages
def test_states_may_change_places(storage):
    """What the states are loaded from is then in memory that is written to."""
    _, opt = trained(storage, num_params=3)
    states = opt.state_dict()
    states["state"] = {index: states["state"][(index + 1) % 3] for index in range(3)}
    expected = copy.deepcopy(states)
    opt.load_state_dict(states)
    _, other = make(storage, num_params=3)
    other.load_state_dict(expected)
    assert all(map(torch.equal, arrays_of(opt), arrays_of(other)))


def test_a_checkpoint_that_has_no_memory_changes_nothing():
    model, opt = trained(cases.STORAGES[0])
    checkpoint = copy.deepcopy(opt.state_dict())
    checkpoint["state"][3]["exp_avg"] = checkpoint["state"][3]["exp_avg"].to("meta")
    update(model, opt, 2)
    before = [array.clone() for array in arrays_of(opt)]
    with pytest.raises(NotImplementedError, match="meta"):
        opt.load_state_dict(checkpoint)
    assert all(map(torch.equal, arrays_of(opt), before))


def test_states_that_require_a_gradient_are_loaded_without_their_graph():
    _, opt = trained(cases.STORAGES[0])
    checkpoint = copy.deepcopy(opt.state_dict())
    for state in checkpoint["state"].values():
        state["exp_avg"].requires_grad_()
    _, other = make(cases.STORAGES[0])
    for loading in (opt, other):
        loading.load_state_dict(checkpoint)
        assert not any(array.requires_grad for array in arrays_of(loading))


@pytest.mark.parametrize("numel", [0, 1, 1 << 10, (1 << 10) + 1, SIZE - 1])
def test_blocks_are_converted_piece_by_piece(monkeypatch, numel):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(0)).square()
    wholes = [block_codes.encode_nearest(values, is_root) for is_root in (False, True)]
    wholes_decoded = [block_codes.decode(*wholes[is_root], is_root) for is_root in (False, True)]
    monkeypatch.setattr(block_codes, "_PIECE", 1 << 10)
    for is_root, (codes, scales) in zip((False, True), wholes, strict=True):
        found = block_codes.encode_nearest(values, is_root)
        assert torch.equal(found[0], codes)
        assert torch.equal(found[1], scales)
        numbers = block_codes.decode(codes, scales, is_root)
        assert torch.equal(numbers, wholes_decoded[is_root])
        assert memory_of(block_codes.encode_nearest, values, is_root) < 3
        assert memory_of(block_codes.decode, codes, scales, is_root) < 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["SGD", "LAMB"])
def test_tables_let_go_of_in_a_pending_step_are_not_overwritten_from_another_stream(name):
    params = [torch.nn.Parameter(torch.zeros(8, device="cuda")) for _ in range(2)]
    opt = getattr(lrs_ext, name)(params, lr=0.1)
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    params[0].grad = torch.ones(8, device="cuda")
    side.wait_stream(main)
    with torch.cuda.stream(side):  # as before the capture of a CUDA graph
        opt.step()
    main.wait_stream(side)
    (tables,) = opt._preparation.tables.all
    known = {t.data_ptr() for t in vars(tables.table).values() if isinstance(t, torch.Tensor)}
    torch.cuda._sleep(100_000_000)
    opt.step()
    done = main.record_event()
    params[1].grad = torch.ones(8, device="cuda")
    opt.step()  # with other tables
    with torch.cuda.stream(side):
        taken = [torch.empty(size, device="cuda") for size in (1, 129) for _ in range(40)]
    assert known.isdisjoint(t.data_ptr() for t in taken) or done.query()


@pytest.mark.gpu
def test_what_a_pending_step_reads_is_not_overwritten_once_the_optimizer_is_gone():
    param = torch.nn.Parameter(torch.zeros(8, device="cuda"))
    param.grad = torch.ones(8, device="cuda")
    opt = lrs_ext.SGD([param], lr=0.1, weight_decay=lrs_ext.linear(0.1, total_steps=4))
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        opt.step()
        torch.cuda._sleep(100_000_000)
        opt.step()
        done = side.record_event()
        buffer, (tables,) = opt.schedule_buffer, opt._preparation.tables.all
        decay = opt._numbers.hyper_schedules.rows(0)["weight_decay"]
        read = [buffer.values, buffer.step, tables.groups.rows, decay]
        known = {tensor.data_ptr() for tensor in read}
        del opt, buffer, tables, decay, read
        gc.collect()
    taken = [torch.empty(1, device="cuda") for _ in range(80)]
    assert known.isdisjoint(t.data_ptr() for t in taken) or done.query()
