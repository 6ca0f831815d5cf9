"""One check for each feature, against plain torch or the CPU, without waits where none may be.

    python benchmarks/gpu_features.py                       # all of them, on the GPU
    python benchmarks/gpu_features.py clipping plateau      # some of them
    python benchmarks/gpu_features.py --device cpu          # what a machine without a GPU can check

Every check takes a device and a backend, returns a line of numbers and raises where they are wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bench_step import difference
from step_contenders import BACKENDS, EXACT, ROUNDED, plain_optimizer, unavailable
from storages import KINDS
from torch import Tensor, nn

import lrs_ext
from lrs_ext import functional

SHAPES = ((), (3,), (7, 11), (2049,), (300, 401))
STEPS = 20
Check = Callable[[torch.device, str], str]


def gradients(dtype: torch.dtype, step: int) -> list[Tensor]:
    """Random tensors on the CPU."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def weights(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """What all begin with, on the CPU; so small that a step is many units of rounding."""
    return [(0.02 * gradient).to(dtype) for gradient in gradients(torch.float32, step=1000)]


def on(device: torch.device, values: list[Tensor]) -> list[Tensor]:
    """Copies, on the CPU too."""
    return [value.to(device, copy=True) for value in values]


def trained(
    make: Callable[[list[Tensor]], torch.optim.Optimizer],
    start: Sequence[Tensor],
    device: torch.device | str,
    schedule: Callable[[int], float] | None = None,
) -> list[Tensor]:
    """Returns the parameters, on the CPU, after steps with gradients that are the same anywhere.

    Args:
        schedule: for optimizers of plain torch: what the learning rate is at each step.
    """
    params = [param.to(device).clone().requires_grad_() for param in start]
    optimizer = make(params)
    for step in range(STEPS):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule(step)
        for param, gradient in zip(params, gradients(start[0].dtype, step), strict=True):
            param.grad = gradient.to(device)
        optimizer.step()
    return [param.detach().cpu() for param in params]


def within(what: str, distance: float, limit: float) -> float:
    """Returns the distance.

    Raises:
        AssertionError: it is beyond the limit, or NaN.
    """
    if not distance <= limit:
        raise AssertionError(f"{what}: distance {distance:.1e}, at most {limit:.0e} is right")
    return distance


@contextlib.contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """On a GPU, makes an error of whatever waits for it."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def rex(steps: int = STEPS) -> lrs_ext.Schedule:
    return lrs_ext.rex(0.01, total_steps=steps, warmup_steps=2)


def check_storages(device: torch.device, backend: str) -> str:
    """Every storage type of every optimizer that has them, against float32 in plain torch."""
    worst = 0.0
    for name in ("SGD", "AdamW", "Lion"):
        options = {"momentum": 0.9} if name == "SGD" else {}
        for kind in KINDS.values():
            start = weights(kind.param_dtype)
            found = trained(
                lambda params, name=name, kind=kind, options=options: getattr(lrs_ext, name)(
                    params, lr=rex(), backend=backend, **options, **kind.options
                ),
                start,
                device,
            )
            expected = trained(
                lambda params, name=name, options=options: plain_optimizer(name)(params, **options),
                [param.float() for param in start],
                "cpu",
                rex(),
            )
            # Rounding decides the sign of small moments, which is all that Lion takes of them.
            limit = EXACT if kind.name == "float32" else 2 * ROUNDED
            apart = difference(found, expected, start)
            worst = max(worst, within(f"{name}, {kind.name}", apart, limit))
    return f"{3 * len(KINDS)} combinations, largest distance {worst:.1e}"


def check_against_plain(device: torch.device, backend: str, name: str) -> str:
    options = {"weight_decay": 0.1}
    found = trained(
        lambda params: getattr(lrs_ext, name)(params, lr=rex(), backend=backend, **options),
        weights(),
        device,
    )
    expected = trained(
        lambda params: plain_optimizer(name)(params, **options), weights(), "cpu", rex()
    )
    return f"distance {within(name, difference(found, expected, weights()), EXACT):.1e}"


def check_lion(device: torch.device, backend: str) -> str:
    return check_against_plain(device, backend, "Lion")


def check_lamb(device: torch.device, backend: str) -> str:
    return check_against_plain(device, backend, "LAMB")


def check_amp(device: torch.device, backend: str) -> str:
    """An overflow under a GradScaler leaves parameters and schedule alone, without a wait."""
    param = torch.ones(2049, device=device, requires_grad=True)
    optimizer = lrs_ext.AdamW([param], lr=rex(), backend=backend)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)

    def update(gradient: Tensor) -> Tensor:
        scaler.scale((param * gradient).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return param.detach().clone()

    good = torch.ones(2049, device=device)
    bad = torch.where(torch.arange(2049, device=device) == 7, torch.inf, good)
    first = update(good)  # what is made at the first step may wait
    with no_waiting(device):
        skipped, last = update(bad), update(good)
    position = int(optimizer.schedule_buffer.step)
    if not torch.equal(first, skipped) or torch.equal(last, skipped) or position != 2:
        raise AssertionError(f"after an overflow the position is {position}, 2 is right")
    return "the overflow was skipped, the schedule stands at 2 after 3 steps"


def check_clipping(device: torch.device, backend: str) -> str:
    """The clipped step against torch's two calls, without a wait."""
    ours, theirs = ([w.requires_grad_() for w in on(device, weights())] for _ in range(2))
    optimizer = lrs_ext.AdamW(ours, lr=1e-2, backend=backend)
    plain = torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(STEPS):
        for params in (ours, theirs):  # torch's clipping writes the gradients
            for param, grad in zip(params, gradients(torch.float32, step), strict=True):
                param.grad = grad.to(device, copy=True)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        plain.step()
        with no_waiting(device) if step else contextlib.nullcontext():
            norm = lrs_ext.clip_grad_norm_(optimizer, 1.0)
            optimizer.step()
        within("the norm", abs(float(norm / expected) - 1), 1e-5)
    apart = difference(ours, theirs, on(device, weights()))
    return f"distance {within('parameters', apart, EXACT):.1e}"


def check_gradient_release(device: torch.device, backend: str) -> str:
    """Steps in the backward pass end where ordinary steps do, and leave no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.Tanh(), nn.Linear(65, 7)).to(device)
    twin = copy.deepcopy(model)
    optimizers = [
        lrs_ext.AdamW(net.parameters(), lr=rex(), backend=backend) for net in (model, twin)
    ]
    optimizers[0].step_in_backward()
    inputs = torch.randn(16, 33, device=device)
    for _ in range(STEPS):
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            net(inputs).square().mean().backward()
            if net is model and any(param.grad is not None for param in model.parameters()):
                raise AssertionError("a gradient is left after the backward pass")
            optimizer.step()
            optimizer.zero_grad()
    start = [torch.zeros_like(param) for param in twin.parameters()]
    apart = difference(list(model.parameters()), list(twin.parameters()), start)
    return f"distance {within('parameters', apart, EXACT):.1e}"


def check_graph(device: torch.device, backend: str) -> str:
    """Replays follow the schedule, and another one that `set_schedule` puts in charge."""
    param = torch.zeros(2049, device=device, requires_grad=True)
    param.grad = torch.ones_like(param)
    first, second = lrs_ext.linear(0.5, total_steps=16), lrs_ext.linear(0.25, total_steps=8)
    optimizer = lrs_ext.SGD([param], lr=first, backend=backend)
    optimizer.step()
    replay: Callable[[], Any] = optimizer.step
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            optimizer.step()
        replay = graph.replay
    for _ in range(3):
        replay()
    optimizer.set_schedule(second)
    for _ in range(4):
        replay()
    expected = -sum(first(k) for k in range(4)) - sum(second(k) for k in range(4, 8))
    within("the sum of learning rates", abs(float(param[0].detach()) - expected), 1e-6)
    kind = "replays" if device.type == "cuda" else "steps"
    return f"7 {kind}, the schedule changed after 3: {float(param[0].detach()):.6f}"


def check_plateau(device: torch.device, backend: str) -> str:
    """The learning rate falls where torch's does, without a wait for the metric."""
    param = torch.zeros(3, device=device, requires_grad=True)
    twin = torch.zeros(3, requires_grad=True)
    optimizer = lrs_ext.SGD([param], lr=0.5, backend=backend)
    plain = torch.optim.SGD([twin], lr=0.5)
    options: dict[str, Any] = {"factor": 0.5, "patience": 2}
    plateau = lrs_ext.ReduceOnPlateau(optimizer, **options)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(plain, **options)
    metrics = [1.0, 0.9, 0.9, 0.9, 0.9, 0.8, 0.8, 0.8, 0.8, 0.8]
    on_device = torch.tensor(metrics, device=device)
    for step, metric in enumerate(metrics):
        param.grad, twin.grad = torch.ones_like(param), torch.ones_like(twin)
        with no_waiting(device) if step else contextlib.nullcontext():
            optimizer.step()
            plateau.step(on_device[step])
        plain.step()
        scheduler.step(metric)
    expected = plain.param_groups[0]["lr"]
    within("the learning rate", abs(optimizer.current_lr()[0] - expected), 1e-7)
    within("parameters", abs(float(param[0].detach()) - float(twin[0].detach())), 1e-5)
    return f"learning rate {expected:g} after two reductions, as torch's"


def check_compiled_step(device: torch.device, backend: str) -> str:
    """`functional.step` inside of a compiled graph, against the optimizer outside."""
    params, twins = on(device, weights()), [w.requires_grad_() for w in on(device, weights())]
    states = [torch.zeros_like(param) for param in params for _ in range(2)]
    counters = [torch.zeros((), device=device) for _ in params]
    position = torch.tensor(0, device=device)
    lr = lrs_ext.ScheduleBuffer(1, STEPS + 1, device=device).fill_(0, rex()).rows[0]
    optimizer = lrs_ext.AdamW(twins, lr=rex(), backend=backend)
    hyper = [1e-2, 0.0, 0.9, 0.999, 1e-8, 1.0]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(grads: list[Tensor]) -> None:
        grads = [2.0 * grad for grad in grads]
        functional.step("adam", params, grads, states, counters, lr, position, hyper)

    for k in range(STEPS):
        grads = on(device, gradients(torch.float32, k))
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = 2.0 * grad
        step(grads)
        optimizer.step()
    apart = difference(params, twins, on(device, weights()))
    return f"distance {within('parameters', apart, EXACT):.1e}"


CHECKS: dict[str, Check] = {
    "storages": check_storages,
    "lion": check_lion,
    "lamb": check_lamb,
    "amp": check_amp,
    "clipping": check_clipping,
    "gradient-release": check_gradient_release,
    "graph": check_graph,
    "plateau": check_plateau,
    "compiled-step": check_compiled_step,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"{', '.join(CHECKS)} (all)")
    parser.add_argument("--device", default="cuda", choices=tuple(BACKENDS), help="(cuda)")
    args = parser.parse_args(argv)
    for name in args.checks:
        if name not in CHECKS:
            parser.error(f"there is no check {name!r}: it must be one of {', '.join(CHECKS)}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("cuda is not here (CUDA devices: 0): use --device cpu")
    missing = unavailable(device)
    backends = [name for name in BACKENDS[device.type] if name not in missing]
    for name, why in missing.items():
        print(f"{name}: not checked, {why}")
    failed = not backends
    for name in args.checks or CHECKS:
        for backend in backends:
            try:
                print(f"{name}, {backend}: {CHECKS[name](device, backend)}", flush=True)
            except Exception:  # the other checks' results are worth having all the same
                failed = True
                traceback.print_exc()
                print(f"{name}, {backend}: FAILED", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
