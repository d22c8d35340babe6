"""Entry point of `vllm.endpoint_plugins`: builds and connects the plugin's parts in each API server process."""

from __future__ import annotations

import asyncio
import logging
from argparse import Namespace
from functools import partial
from typing import Any

from be_serve.core.errors import BEError, IncompatibleVLLM
from be_serve.core.fingerprint import fingerprint_folder
from be_serve.core.slots import SlotRenderer
from be_serve.serving import routes
from be_serve.serving.hook import ChatHook
from be_serve.serving.injection import vectors
from be_serve.serving.injection.base import Injection
from be_serve.serving.injection.byte_budget import ByteBudget
from be_serve.serving.injection.prompt_embeds import PromptEmbeds
from be_serve.serving.injection.resident_rows import ResidentRows
from be_serve.serving.injection.row_pool import RowPool
from be_serve.serving.metrics import metrics
from be_serve.serving.middleware import BEMiddleware
from be_serve.serving.resolve import Resolver
from be_serve.serving.service import ServedModel, Service
from be_serve.serving.settings import Settings
from be_serve.serving.vllm import hooks, versions
from be_serve.serving.vllm import rows as engine_rows

logger = logging.getLogger("vllm.be_serve")


class BEEndpointPlugin:
    """Implements vLLM's EndpointPlugin protocol. vLLM loads it only if VLLM_PLUGINS names `be_serve`."""

    name = versions.PLUGIN_NAME
    required_tasks = ("generate",)

    def __init__(self) -> None:
        versions.check_version()
        self._settings = Settings.from_env()

    def attach_router(self, app: Any) -> None:
        """Add the admin routes, the handler for BEError and the middleware."""
        app.include_router(routes.router)
        app.add_exception_handler(BEError, routes.be_error_handler)
        app.add_middleware(
            BEMiddleware,
            base_models=partial(hooks.base_models, app.state),
            metrics=metrics,
            is_route=partial(routes.is_post_route, app),
            require=self._settings.require,
        )

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Install the hook in the running server. Raises BEError, which stops the start of the server."""
        hooks.check_server(state)
        model = await asyncio.to_thread(_served_model, engine_client, state)
        dtype = engine_client.model_config.dtype
        injection = await self._injection(engine_client, state)
        service = Service(
            self._settings,
            model,
            metrics(),
            prepare=partial(vectors.prepare, dtype=dtype),
            vllm_has_api_key=bool(hooks.api_keys(args)),
            capacity=injection.capacity,
        )
        await asyncio.to_thread(service.start)
        metrics().info.labels(injection=injection.name).set(1)
        online = state.online_renderer
        resolver = Resolver(
            service.index,
            partial(hooks.base_models, state),
            match=self._settings.match,
            usable=service.usable,
        )
        hook = ChatHook(
            resolver=resolver,
            index=service.index,
            slots=SlotRenderer(online.renderer.get_tokenizer(), chat_template=online.chat_template),
            injection=injection,
            keys=hooks.api_keys(args),
            vocab_size=model.vocab_size,
            max_chars=hooks.max_prompt_chars(state),
            metrics=metrics(),
            require=self._settings.require,
        )
        hooks.install_chat_hook(state, hook)
        hooks.install_messages(state)
        hooks.install_aliases(state, service.listed if self._settings.list_aliases else list)
        state.be_serve = service
        logger.info(
            "be-serve: %d tokens for %s (fingerprint %s), injection %s%s, administration %s%s.",
            len(service.index.records()),
            model.name,
            model.fingerprint,
            injection.name,
            "" if injection.capacity is None else f" with {injection.capacity} rows in this process",
            "on" if self._settings.admin_key else "off",
            ", chats without a token refused" if self._settings.require else "",
        )

    async def _injection(self, engine_client: Any, state: Any) -> Injection:
        """The injection of the settings; for `auto` the one the engine was started for. Raises BEError if not ready."""
        rows = engine_rows.engine_rows(engine_client)
        name = self._settings.injection
        if name == "auto":
            name = "resident-rows" if rows else "prompt-embeds"
        if name == "prompt-embeds":
            hooks.close_raw_embeddings(state, engine_client)
            return PromptEmbeds(ByteBudget(self._settings.inflight_bytes, metrics().inflight.set))
        if not rows:
            raise IncompatibleVLLM(
                "The engine was started without rows for tokens. Start it with `be-serve serve`, or add to your vLLM "
                "command: --additional-config '{\"be_rows\": 1024}'."
            )
        engine_rows.install_rows(state, engine_client)
        table = await engine_rows.open_rows(engine_client, state)
        pool = RowPool(table.rows, partial(engine_rows.write_rows, engine_client), observe=metrics().observe_rows)
        return ResidentRows(pool, table.first)


def _served_model(engine_client: Any, state: Any) -> ServedModel:
    config = engine_client.model_config
    folder = hooks.model_folder(engine_client)
    return ServedModel(
        name=hooks.base_models(state)[0],
        fingerprint=fingerprint_folder(folder, chat_template=state.online_renderer.chat_template),
        hidden_size=config.get_hidden_size(),
        vocab_size=config.get_vocab_size(),
        dtype=str(config.dtype).removeprefix("torch."),
    )
