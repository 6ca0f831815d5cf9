"""Where numbers come from: the machine, and what a call puts on its GPU."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path

import torch
from torch.autograd import DeviceType

from lrs_ext.timing import Call


def launches(call: Call) -> int | None:
    """Counts the kernels and copies that one call puts on the GPU; None if they cannot be seen."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    try:
        for _ in range(2):  # the first one also sets the profiler up
            with torch.profiler.profile(activities=activities) as profiler:
                call()
                torch.cuda.synchronize()
    except RuntimeError:
        return None
    # torch also shows the span of an annotated range, such as Optimizer.step, on the device.
    count = sum(
        event.device_type == DeviceType.CUDA and not event.is_user_annotation
        for event in profiler.events()
    )
    return count or None


def machine(device: torch.device) -> dict[str, str]:
    """Describes where the numbers come from; the first entry names the device."""
    cpu = _cpu_model()
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "measured on": time.strftime("%Y-%m-%d"),
        "CPU": f"{cpu}, {os.cpu_count()} cores",
        "CPU instruction set": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "load average before": f"{os.getloadavg()[0]:.1f}",
        "Python": platform.python_version(),
        "lrs_ext": _version("lrs_ext"),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        memory = torch.cuda.get_device_properties(device).total_memory
        facts["compute capability"] = f"{major}.{minor}"
        facts["GPU memory"] = f"{memory / 2**30:.0f} GiB"
        facts["CUDA of torch"] = str(torch.version.cuda)
    return facts


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
