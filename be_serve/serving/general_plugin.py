"""Entry point of `vllm.general_plugins`: runs in every process of every vLLM on the machine.

Does nothing unless VLLM_PLUGINS names `be_serve`, and may run twice.
"""

from __future__ import annotations

import os


def register() -> None:
    """Patch what must be patched on the engine's side, and insist on the endpoint plugin."""
    if "be_serve" not in os.environ.get("VLLM_PLUGINS", "").split(","):
        return
    from be_serve.serving.vllm import engine, versions

    versions.check_version()
    versions.require_endpoint_plugin()
    engine.install_resident_rows()
    if engine.on_cpu():
        engine.patch_cpu_seed()
