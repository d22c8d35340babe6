"""Entry point of `vllm.general_plugins`. vLLM calls it in every process of every vLLM of this Python environment.

It does nothing unless VLLM_PLUGINS names `be_serve`. vLLM may call it twice in one process.
"""

from __future__ import annotations

import os


def register() -> None:
    """Patch the engine's processes, and make the server stop if the endpoint plugin does not load."""
    if "be_serve" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from be_serve.serving.vllm import engine, versions

    versions.check_version()
    versions.require_endpoint_plugin()
    engine.install_resident_rows()
    if engine.on_cpu():
        engine.patch_cpu_seed()
