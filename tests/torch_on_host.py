"""torch's operators on CUDA tensors without a GPU: the CPU's, on the same memory.

For a process that `cuda_on_host/runtime_*.cpp` was preloaded into. An operator waits in its stream,
or in the graph that captures it, like a kernel: its results have their shapes from the meta device
and their numbers later. What depends on numbers, draws random ones or has no meta kernel runs at
once, after all that waits in any stream.
"""

import ctypes
import functools
import importlib.util
import sys
import traceback
import types
import warnings

import torch
from torch.utils._python_dispatch import _disable_current_modes

runtime = ctypes.CDLL(None)
Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

# What torch's own kernels for CUDA do without launching one: memory, views, numbers for Python.
OF_TORCH = {
    "aten::_local_scalar_dense",
    "aten::_reshape_alias",
    "aten::as_strided",
    "aten::empty.memory_format",
    "aten::empty_strided",
    "aten::is_set_to",
    "aten::record_stream",
    "aten::resize_",
    "aten::set_",
    "aten::set_.source_Storage",
    "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor",
    "aten::unfold",
    "aten::view",
    "aten::view.dtype",
    "aten::view_as_complex",
    "aten::view_as_real",
}
AT_ONCE = {
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.nondeterministic_seeded,
}
LIBRARIES = {name: torch.library.Library(name, "IMPL") for name in ("aten", "c10d")}


class Place:
    """Where the numbers of a CUDA tensor are, without keeping its memory alive."""

    def __init__(self, tensor):
        storage = tensor.untyped_storage()
        self.pointer, self.bytes, self.dtype = storage.data_ptr(), storage.nbytes(), tensor.dtype
        self.layout = (tensor.size(), tensor.stride(), tensor.storage_offset())

    def on_cpu(self):
        """Returns a CPU tensor of the same memory."""
        size, stride, offset = self.layout
        if not self.bytes:
            return torch.empty_strided(size, stride, dtype=self.dtype, device="cpu")
        storage = cpu_storage(self.pointer, self.bytes)
        return torch.empty(0, dtype=self.dtype, device="cpu").set_(storage, offset, size, stride)


@functools.lru_cache(10_000)
def cpu_storage(pointer, count):
    memory = (ctypes.c_char * count).from_address(pointer)
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def mapped(function, value):
    """Returns nested lists, tuples and dicts with `function(x)` for each x that is none of them."""
    if isinstance(value, (list, tuple)):
        return type(value)([mapped(function, entry) for entry in value])
    if isinstance(value, dict):
        return {key: mapped(function, entry) for key, entry in value.items()}
    return function(value)


def flat(value):
    found = []
    mapped(found.append, value)
    return found


def is_cuda(value):
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def elsewhere(arguments, device, tensor_for):
    """Returns arguments with `tensor_for(x)` for each tensor and `device` for CUDA devices."""

    def replace(value):
        if isinstance(value, torch.Tensor):
            return tensor_for(value)
        if isinstance(value, torch.device) and value.type == "cuda":
            return torch.device(device)
        is_generator = isinstance(value, torch.Generator)
        return None if is_generator and value.device.type == "cuda" else value

    return mapped(replace, arguments)


def device_of(args, kwargs):
    if kwargs.get("device") is not None:
        return torch.device(kwargs["device"])
    tensors = filter(is_cuda, flat((args, kwargs)))
    return next(
        (tensor.device for tensor in tensors), torch.device("cuda", torch.cuda.current_device())
    )


class Twins:
    """The tensors among the arguments of a call, each with one twin elsewhere."""

    def __init__(self, make):
        self.make, self.pairs = make, {}

    def twin(self, tensor):
        if id(tensor) not in self.pairs:
            self.pairs[id(tensor)] = (tensor, self.make(tensor))
        return self.pairs[id(tensor)][1]

    def original(self, twin):
        return next((tensor for tensor, other in self.pairs.values() if other is twin), None)

    def __iter__(self):
        return iter(self.pairs.values())


def operator_on_host(name, overload):
    """Returns what stands for an operator on CUDA tensors."""
    schema = overload._schema
    packet = getattr(getattr(torch.ops, schema.name.split("::")[0]), schema.name.split("::")[1])
    tensors = [i for i, argument in enumerate(schema.arguments) if str(argument.type) == "Tensor"]
    may_wait = not AT_ONCE & set(overload.tags) and name.startswith("aten::")

    def run(*args, **kwargs):
        # torch hands wrapped numbers over as Python's; another overload takes those.
        has_number = any(i < len(args) and not isinstance(args[i], torch.Tensor) for i in tensors)
        op = packet if has_number else overload
        with torch.cuda.device(device_of(args, kwargs)):
            if is_capturing() or may_wait:
                found = shapes(op, args, kwargs)
                if found is not None:
                    return later(op, args, kwargs, *found)
            return now(op, args, kwargs)

    return run


def is_capturing():
    return torch.cuda.is_current_stream_capturing()


def empty_as(tensor, device):
    """Returns a tensor of the same layout, without numbers."""
    size, stride = tensor.size(), tensor.stride()
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=device)


def layouts_of(value, tensors):
    """Returns a key for all on which the shapes of results depend; `tensors` has those before."""
    if isinstance(value, (list, tuple)):
        return tuple([layouts_of(entry, tensors) for entry in value])
    if isinstance(value, dict):
        return tuple([(key, layouts_of(entry, tensors)) for key, entry in value.items()])
    if not isinstance(value, torch.Tensor):
        return type(value), value
    place = tensors.setdefault(id(value), len(tensors))
    return place, value.size(), value.stride(), value.dtype, value.device.type


known_shapes = {}


def shapes(op, args, kwargs):
    """Returns the results of a call on twins without numbers, and these; None if it has none."""
    if len(known_shapes) > 10_000:
        known_shapes.clear()
    key = op, layouts_of((args, kwargs), {})
    if key not in known_shapes:
        known_shapes[key] = find_shapes(op, args, kwargs)
    return known_shapes[key]


def find_shapes(op, args, kwargs):
    def twin(tensor):
        if is_cuda(tensor):
            return empty_as(tensor, "meta")
        return empty_as(tensor, "cpu") if tensor.dim() else tensor.detach().clone()

    twins = Twins(twin)
    try:
        args, kwargs = elsewhere((list(args), kwargs), "meta", twins.twin)
        results = op(*args, **kwargs)
    except (RuntimeError, NotImplementedError):
        return None
    for result in flat(results):
        if not isinstance(result, (torch.Tensor, types.NoneType)):
            return None
        if result is not None and twins.original(result) is None and result._is_view():
            return None
    return results, [twin for _, twin in twins]


def later(op, args, kwargs, results, twins):
    """Lets the current stream call an operator; returns its results, without numbers so far."""
    tensors = {id(t): t for t in flat((args, kwargs)) if isinstance(t, torch.Tensor)}.values()
    originals = {}
    for tensor, twin in zip(tensors, twins, strict=True):
        originals[id(twin)] = tensor
        if twin.size() != tensor.size():  # an `out` that had no elements
            tensor.resize_(twin.size())
    fresh = []

    def result(shape):
        if shape is None or id(shape) in originals:
            return originals.get(id(shape))
        made = empty_as(shape, "cuda")
        fresh.append(Place(made))
        return made

    results = mapped(result, results)
    places = Twins(lambda tensor: Place(tensor) if is_cuda(tensor) else tensor.clone())
    args, kwargs = elsewhere((list(args), kwargs), "cpu", places.twin)

    def work():
        cpu = {}

        def on_cpu(value):
            if isinstance(value, Place):
                return cpu.setdefault(id(value), value.on_cpu())
            return value

        found = op(*mapped(on_cpu, args), **mapped(on_cpu, kwargs))
        given = {id(tensor) for tensor in cpu.values()}
        tensors = [t for t in flat(found) if isinstance(t, torch.Tensor)]
        made = [tensor for tensor in tensors if id(tensor) not in given]
        for place, tensor in zip(fresh, made, strict=True):
            place.on_cpu().copy_(tensor)

    enqueue(work)
    return results


def now(op, args, kwargs):
    """Calls an operator at once, after all that waits in any stream."""
    if is_capturing():
        torch._C._cuda_synchronize()
    elif runtime.on_host_run_everything():
        raise RuntimeError("work that was waiting has failed; its traceback is printed above")
    twins = Twins(lambda tensor: Place(tensor).on_cpu() if is_cuda(tensor) else tensor)
    cpu_args, cpu_kwargs = elsewhere((list(args), kwargs), "cpu", twins.twin)
    results = op(*cpu_args, **cpu_kwargs)
    for tensor, twin in twins:
        if twin.size() != tensor.size():  # and so has other memory
            tensor.resize_(twin.size())
            Place(tensor).on_cpu().copy_(twin)
    works = results if isinstance(results, (list, tuple)) else [results]
    for work in works:
        if isinstance(work, torch.ScriptObject):
            torch._C._distributed_c10d.Work.unbox(work).wait()

    def result(tensor):
        if not isinstance(tensor, torch.Tensor):
            return tensor
        original = twins.original(tensor)
        if original is not None:
            return original
        made = empty_as(tensor, "cuda")
        Place(made).on_cpu().copy_(tensor)
        return made

    return mapped(result, results)


waiting = {}


def enqueue(work):
    """Puts a function into the current stream, whose next wait tells of an error."""
    waiting[id(work)] = work
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(torch.cuda.current_device()))
    runtime.on_host_enqueue(stream, run_waiting, ctypes.c_void_p(id(work)), drop_waiting)


@Callback
def run_waiting(key):
    try:
        with torch.inference_mode(False), torch.no_grad(), _disable_current_modes():
            waiting[key]()
    except BaseException:
        traceback.print_exc()
        runtime.on_host_fail()


@Callback
def drop_waiting(key):
    del waiting[key]


copy_on_device = operator_on_host("aten::copy_", torch.ops.aten.copy_.default)


def copy_(target, source, non_blocking=False):
    """As torch's: between devices a copy of bytes in the stream, all else on that of the source."""
    device = source.device if is_cuda(source) else target.device
    with torch.cuda.device(device):
        if is_one_block_of(target, source):
            # Any other key of a device leads to torch's common function.
            keys = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
            return torch.ops.aten.copy_.default.redispatch(keys, target, source, non_blocking)
        if target.device == source.device:
            return copy_on_device(target, source, non_blocking)
        staged = torch.empty(target.shape, dtype=target.dtype, device=source.device)
        staged.copy_(source)
        if target.is_contiguous():
            return target.copy_(staged, non_blocking)
        arrived = torch.empty(target.shape, dtype=target.dtype, device=target.device)
        return target.copy_(arrived.copy_(staged, non_blocking))


def is_one_block_of(target, source):
    """Whether a copy moves the bytes of one block of memory as they are."""
    facts = [(t.dtype, t.size(), t.is_neg(), t.is_conj()) for t in (target, source)]
    if facts[0] != facts[1]:
        return False
    if target.is_contiguous() and source.is_contiguous():
        return True
    last = sum((n - 1) * stride for n, stride in zip(target.size(), target.stride(), strict=True))
    return target.stride() == source.stride() and last + 1 == target.numel()


def foreach_copy_(targets, sources, non_blocking=False):
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking)


def split_with_sizes_copy(tensor, sizes, dim=0, *, out):
    for target, part in zip(out, tensor.split_with_sizes(sizes, dim), strict=True):
        target.copy_(part)


layer_norm_backward = operator_on_host(
    "aten::native_layer_norm_backward", torch.ops.aten.native_layer_norm_backward.default
)


def native_layer_norm_backward(grad, source, shape, mean, rstd, *others):
    """As torch's, whose kernel for CPUs wants statistics of the type that its own forward has."""
    weight = others[0]
    dtype = source.dtype if weight is None else weight.dtype
    return layer_norm_backward(grad, source, shape, mean.to(dtype), rstd.to(dtype), *others)


OURS = {
    "copy_": copy_,
    "native_layer_norm_backward": native_layer_norm_backward,
    "_foreach_copy_": foreach_copy_,
    "split_with_sizes_copy.out": split_with_sizes_copy,
}


def install(native):
    """Puts the operators in place; `native` is the module with lrs_ext's kernels on the host."""
    warnings.filterwarnings("ignore", message=".*overrid")
    for name, function in OURS.items():
        LIBRARIES["aten"].impl(name, function, "CUDA")
    for name in sorted(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")):
        namespace, _, rest = name.partition("::")
        if namespace not in LIBRARIES or name in OF_TORCH or rest in OURS:
            continue
        base, _, overload = rest.partition(".")
        packet = getattr(getattr(torch.ops, namespace), base, None)
        if packet is None or (overload or "default") not in packet.overloads():
            continue  # not for Python
        function = operator_on_host(name, getattr(packet, overload or "default"))
        LIBRARIES[namespace].impl(rest, function, "CUDA")
    for fused in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{fused}_sdp")(False)
    use_gloo()
    sys.meta_path.insert(0, NativeModule(native))


def use_gloo():
    """Lets gloo do the work of NCCL."""
    if not torch.distributed.is_available():
        return
    import torch.distributed.distributed_c10d as c10d

    init = c10d.init_process_group

    @functools.wraps(init)
    def init_process_group(backend=None, *args, **kwargs):
        backend = "cpu:gloo,cuda:gloo" if backend in (None, "nccl") else backend
        return init(backend, *args, **kwargs)

    torch.distributed.init_process_group = c10d.init_process_group = init_process_group


class NativeModule(types.SimpleNamespace):
    """Finds lrs_ext._C elsewhere than in the package."""

    def __init__(self, path):
        super().__init__(path=path)

    def find_spec(self, name, path=None, target=None):
        if name != "lrs_ext._C":
            return None
        return importlib.util.spec_from_file_location(name, self.path)
