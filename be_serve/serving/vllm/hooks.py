"""Changes to vLLM in the API server's process, for vLLM 0.32 and 0.33.

At start the server checks that vLLM has every name it needs. A vLLM that renamed one then gives a clear error
and no wrong answer. The module `engine` has the changes in the workers.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from be_serve.core.errors import BEError, IncompatibleVLLM
from be_serve.core.ids import alias_of, split_alias
from be_serve.registry import Record
from be_serve.serving.fallback import PlainChat
from be_serve.serving.hook import ChatHook, Rendering
from be_serve.serving.middleware import current, error_body
from be_serve.serving.requests import EMBEDS_MARKER
from be_serve.serving.vllm.versions import SUPPORTED_VERSIONS

_PREPROCESS_PARAMETERS = (
    "request",
    "messages",
    "default_template",
    "default_template_content_format",
    "default_template_kwargs",
    "tool_dicts",
    "parser",
    "skip_mm_cache",
)
_USE_SUPPORTED = f"install a supported vLLM ({', '.join(SUPPORTED_VERSIONS)})."
_rendering: ContextVar[Rendering | None] = ContextVar("be_serve_rendering", default=None)
logger = logging.getLogger("vllm.be_serve")


def check_server(state: Any) -> None:
    """Raise IncompatibleVLLM if the running server lacks something that the hook needs."""
    online = getattr(state, "online_renderer", None)
    base = getattr(online, "renderer", None)
    if online is None or base is None or getattr(state, "openai_serving_models", None) is None:
        raise IncompatibleVLLM(f"This vLLM has no chat renderer where be-serve expects it; {_USE_SUPPORTED}")
    parameters = tuple(inspect.signature(online.preprocess_chat).parameters)
    if parameters != _PREPROCESS_PARAMETERS:
        raise IncompatibleVLLM(
            f"vLLM's preprocess_chat takes {parameters}, expected {_PREPROCESS_PARAMETERS}; {_USE_SUPPORTED}"
        )
    for name in ("render_messages_async", "validate_token_ids", "get_tokenizer", "_executor"):
        if not hasattr(base, name):
            raise IncompatibleVLLM(f"vLLM's renderer has no {name}; {_USE_SUPPORTED}")
    config = base.model_config
    other_revision = config.tokenizer_revision not in (None, config.revision)
    if config.tokenizer != config.model or other_revision or config.hf_overrides:
        raise IncompatibleVLLM(
            "Tokens are trained for the tokenizer and config.json in the model's own folder: start the server without "
            "--tokenizer, --tokenizer-revision and --hf-overrides, or put their changes into the folder and train "
            "tokens with that folder."
        )
    if getattr(online, "use_harmony", False):
        raise IncompatibleVLLM(
            "gpt-oss models render chats outside vLLM's common renderer, so they cannot use tokens; start this model "
            "with plain `vllm serve`."
        )


def install_chat_hook(state: Any, hook: ChatHook) -> None:
    """Wrap vLLM's chat renderer, which the endpoints for chat, batch chat, responses and tokenize share."""
    online, base = state.online_renderer, state.online_renderer.renderer
    original_chat, original_messages = online.preprocess_chat, base.render_messages_async
    signature = inspect.signature(original_chat)

    async def preprocess_chat(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        arguments = call.arguments
        rendering = await hook.begin(arguments["request"], arguments["messages"], arguments.get("tool_dicts"))
        if rendering is None:
            return await original_chat(*args, **kwargs)
        defaults = arguments["default_template_kwargs"]

        def use(chat: Rendering | PlainChat) -> None:
            arguments["messages"] = chat.messages
            # The template variables of the token are defaults: those in the request override them.
            arguments["default_template_kwargs"] = {**(defaults or {}), **chat.template_kwargs}

        async def render_plain(chat: PlainChat) -> Any:
            use(chat)
            conversation, engine_inputs = await original_chat(*call.args, **call.kwargs)
            return conversation, [chat.with_cache_salt(engine_input) for engine_input in engine_inputs]

        if isinstance(rendering, PlainChat):
            return await render_plain(rendering)
        use(rendering)
        reset = _rendering.set(rendering)
        try:
            conversation, engine_inputs = await original_chat(*call.args, **call.kwargs)
            return conversation, [hook.finish(rendering, engine_input) for engine_input in engine_inputs]
        except BEError as exc:
            chat = await hook.on_unavailable(rendering, exc)  # raises if there is no chat to answer instead
        finally:
            _rendering.reset(reset)
        return await render_plain(chat)

    async def render_messages_async(*args: Any, **kwargs: Any) -> Any:
        conversation, prompt = await original_messages(*args, **kwargs)
        rendering = _rendering.get()
        if rendering is None:
            return conversation, prompt
        # Not on the event loop, but in the thread pool whose tokenizers vLLM made thread-safe.
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(base._executor, hook.cut, rendering, hook.check_prompt(prompt))
        kept = {key: value for key, value in prompt.items() if key != "prompt"}
        return conversation, {**kept, "prompt_token_ids": ids}

    online.preprocess_chat = preprocess_chat
    base.render_messages_async = render_messages_async


def install_messages(state: Any) -> None:
    """Patch /v1/messages: copy the be-serve fields to vLLM's chat request, and answer errors in Anthropic's shape."""
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    handler = getattr(state, "anthropic_serving_messages", None)
    if handler is None:
        return
    convert = handler.to_chat_completion_request

    def to_chat_completion_request(*args: Any, **kwargs: Any) -> Any:
        chat_request = convert(*args, **kwargs)
        context = current.get()
        for name, value in context.fields.items() if context else ():
            setattr(chat_request, name, value)
        return chat_request

    def with_error_response(original: Callable[..., Any]) -> Callable[..., Any]:
        async def answer(*args: Any, **kwargs: Any) -> Any:
            try:
                return await original(*args, **kwargs)
            except BEError as exc:
                return ErrorResponse(error=ErrorInfo(**error_body(exc)["error"]))

        return answer

    handler.to_chat_completion_request = to_chat_completion_request
    handler.create_messages = with_error_response(handler.create_messages)
    handler.count_tokens = with_error_response(handler.count_tokens)


def install_aliases(state: Any, records: Callable[[], Sequence[Record]]) -> None:
    """Accept `base:be_id` as a model name, list the aliases of `records`, and refuse adapters with such names.

    vLLM looks for an adapter first, so an adapter with an alias's name would answer the token's requests. Raises
    IncompatibleVLLM if the server was started with such an adapter. Loading one later is refused with 400.
    """
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, ModelCard, ModelPermission

    models = state.openai_serving_models

    def is_alias(name: str) -> bool:
        # Does not check that the id exists: the hook does, with a better error.
        return split_alias(name, base_models(state)) is not None

    def taken(name: str) -> str:
        return f"The adapter {name!r} has the form of a token's alias (base model, colon, token); give it another name."

    for name in models.lora_requests:
        if is_alias(name):
            raise IncompatibleVLLM(taken(name))
    original_check, original_show = models.is_base_model, models.show_available_models
    original_load, original_resolve = models.load_lora_adapter, models.resolve_lora

    def is_base_model(model_name: str) -> bool:
        return bool(original_check(model_name)) or is_alias(model_name)

    def refused(name: str) -> ErrorResponse:
        return ErrorResponse(error=ErrorInfo(message=taken(name), type="InvalidUserInput", param="lora_name", code=400))

    async def load_lora_adapter(request: Any, *args: Any, **kwargs: Any) -> Any:
        if is_alias(request.lora_name):
            return refused(request.lora_name)
        return await original_load(request, *args, **kwargs)

    async def resolve_lora(lora_name: str) -> Any:  # vLLM's resolver plugins may accept any name
        return refused(lora_name) if is_alias(lora_name) else await original_resolve(lora_name)

    cache: tuple[Sequence[Record], list[ModelCard]] = ([], [])

    async def show_available_models() -> Any:
        nonlocal cache
        listed, tokens = await original_show(), records()
        if tokens is not cache[0]:  # cached, because there may be thousands of tokens and any client may ask
            parent = base_models(state)[0]
            permission = [ModelPermission()]
            cards = [
                ModelCard(id=alias_of(parent, token.id), root=token.digest, parent=parent, permission=permission)
                for token in tokens
            ]
            cache = tokens, cards
        listed.data.extend(cache[1])
        return listed

    models.is_base_model = is_base_model
    models.load_lora_adapter = load_lora_adapter
    models.resolve_lora = resolve_lora
    models.show_available_models = show_available_models


def api_keys(args: Any) -> list[str]:
    """vLLM's own API keys, from its option or from VLLM_API_KEY."""
    keys = args.api_key or os.environ.get("VLLM_API_KEY") or []
    return [keys] if isinstance(keys, str) else [key for key in keys if key]


def base_models(state: Any) -> list[str]:
    """The served names of the base model; empty while the server starts."""
    models = getattr(state, "openai_serving_models", None)
    return [path.name for path in models.base_model_paths] if models is not None else []


def close_raw_embeddings(state: Any, engine_client: Any) -> None:
    """Refuse embeddings from clients, so that only tokens use the engine's embeddings input.

    The engine runs with `--enable-prompt-embeds`. This function switches the option off in the API process only,
    so vLLM itself refuses embeddings from clients. vLLM's placeholder token has an id outside the model's
    vocabulary; it is refused wherever vLLM validates ids.
    """
    from vllm.exceptions import VLLMValidationError

    config = engine_client.model_config
    if not config.enable_prompt_embeds:
        raise IncompatibleVLLM(
            "The engine was started without --enable-prompt-embeds, which injection `prompt-embeds` needs, and without "
            "rows for tokens. Start it with `be-serve serve`, or add to your vLLM command: --enable-prompt-embeds, or "
            """--additional-config '{"be_rows": 1024}' for resident rows."""
        )
    base = state.online_renderer.renderer
    config.enable_prompt_embeds = False
    base.model_config.enable_prompt_embeds = False
    placeholder = base.get_tokenizer().get_added_vocab().get(EMBEDS_MARKER)
    original = base.validate_token_ids

    def validate_token_ids(token_ids: Sequence[int], *, parameter: str | None = None) -> None:
        original(token_ids, parameter=parameter)
        if placeholder is not None and placeholder in token_ids:
            raise VLLMValidationError(
                f"The text {EMBEDS_MARKER} is reserved on this server; remove it.", parameter=parameter
            )

    base.validate_token_ids = validate_token_ids


def max_prompt_chars(state: Any) -> int:
    """Largest number of characters that can fit the context. vLLM uses the same limit before tokenisation."""
    base = state.online_renderer.renderer
    return int(base.model_config.max_model_len * base.get_tokenizer().max_chars_per_token)


def model_folder(engine_client: Any) -> Path:
    """The folder with the served model's files. For a Hugging Face name it is in the local cache."""
    config = engine_client.model_config
    folder = Path(config.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    # vLLM has already downloaded the model, so this downloads nothing.
    return Path(
        snapshot_download(
            config.model,
            revision=config.revision,
            local_files_only=True,
            allow_patterns=["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"],
        )
    )
