"""Where and when a figure was measured; printed by every benchmark that quotes a time."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch


def machine() -> dict[str, str | int | float]:
    """CPU, cores, threads, load before the run, versions, date."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else -1.0,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def machine_line() -> str:
    """The same in one line."""
    m = machine()
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['torch_threads']} threads, load {m['load_average']}, "
        f"torch {m['torch']}, {m['date']}"
    )


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
