"""What the API server's process changes in vLLM, for vLLM 0.32 and 0.33.

Each expectation is checked when a server starts, so that a vLLM that moved something
gives one clear error instead of a wrong answer. The workers' side is `engine`.
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
_rendering: ContextVar[Rendering | None] = ContextVar("be_serve_rendering", default=None)
logger = logging.getLogger("vllm.be_serve")


def check_server(state: Any) -> None:
    """Raise IncompatibleVLLM where the running server lacks what the hook needs."""
    online = getattr(state, "online_renderer", None)
    base = getattr(online, "renderer", None)
    if online is None or base is None or getattr(state, "openai_serving_models", None) is None:
        raise IncompatibleVLLM("This vLLM keeps its chat renderer elsewhere; be-serve cannot hook into it.")
    parameters = tuple(inspect.signature(online.preprocess_chat).parameters)
    if parameters != _PREPROCESS_PARAMETERS:
        raise IncompatibleVLLM(f"vLLM's preprocess_chat takes {parameters}, expected {_PREPROCESS_PARAMETERS}.")
    for name in ("render_messages_async", "validate_token_ids", "get_tokenizer", "_executor"):
        if not hasattr(base, name):
            raise IncompatibleVLLM(f"vLLM's renderer has no {name}; be-serve cannot hook into it.")
    config = base.model_config
    other_revision = config.tokenizer_revision not in (None, config.revision)
    if config.tokenizer != config.model or other_revision or config.hf_overrides:
        raise IncompatibleVLLM(
            "Tokens are made for the tokenizer and config.json in the model's own folder: start the server without "
            "--tokenizer, --tokenizer-revision and --hf-overrides, or put what they change into the folder and train "
            "tokens from there."
        )
    if getattr(online, "use_harmony", False):
        raise IncompatibleVLLM("gpt-oss models render chats outside vLLM's common renderer; tokens cannot reach them.")


def install_chat_hook(state: Any, hook: ChatHook) -> None:
    """Wrap the one renderer behind chat, batch chat, responses and tokenize."""
    online, base = state.online_renderer, state.online_renderer.renderer
    original_chat, original_messages = online.preprocess_chat, base.render_messages_async
    signature = inspect.signature(original_chat)

    async def preprocess_chat(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        rendering = await hook.begin(given["request"], given["messages"], given.get("tool_dicts"))
        if rendering is None:
            return await original_chat(*args, **kwargs)
        defaults = given["default_template_kwargs"]

        def take(chat: Rendering | PlainChat) -> None:
            given["messages"] = chat.messages
            # The token's pinned template variables; the request's own still win over them.
            given["default_template_kwargs"] = {**(defaults or {}), **chat.template_kwargs}

        async def answer(chat: PlainChat) -> Any:
            take(chat)
            conversation, engine_inputs = await original_chat(*call.args, **call.kwargs)
            return conversation, [chat.apart(engine_input) for engine_input in engine_inputs]

        if isinstance(rendering, PlainChat):
            return await answer(rendering)
        take(rendering)
        reset = _rendering.set(rendering)
        try:
            conversation, engine_inputs = await original_chat(*call.args, **call.kwargs)
            return conversation, [hook.finish(rendering, engine_input) for engine_input in engine_inputs]
        except BEError as exc:
            chat = await hook.give_up(rendering, exc)  # or raises
        finally:
            _rendering.reset(reset)
        return await answer(chat)

    async def render_messages_async(*args: Any, **kwargs: Any) -> Any:
        conversation, prompt = await original_messages(*args, **kwargs)
        rendering = _rendering.get()
        if rendering is None:
            return conversation, prompt
        # Off the event loop, in the pool whose tokenizers vLLM made thread-safe.
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(base._executor, hook.cut, rendering, hook.check_prompt(prompt))
        kept = {key: value for key, value in prompt.items() if key != "prompt"}
        return conversation, {**kept, "prompt_token_ids": ids}

    online.preprocess_chat = preprocess_chat
    base.render_messages_async = render_messages_async


def install_messages(state: Any) -> None:
    """Carry our fields onto the chat request that vLLM makes of a Messages request; our errors in its shape."""
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    handler = getattr(state, "anthropic_serving_messages", None)
    if handler is None:
        return
    convert = handler.to_chat_completion_request

    def to_chat_completion_request(*args: Any, **kwargs: Any) -> Any:
        made = convert(*args, **kwargs)
        context = current.get()
        for name, value in context.fields.items() if context else ():
            setattr(made, name, value)
        return made

    def answering(original: Callable[..., Any]) -> Callable[..., Any]:
        async def answer(*args: Any, **kwargs: Any) -> Any:
            try:
                return await original(*args, **kwargs)
            except BEError as exc:
                return ErrorResponse(error=ErrorInfo(**error_body(exc)["error"]))

        return answer

    handler.to_chat_completion_request = to_chat_completion_request
    handler.create_messages = answering(handler.create_messages)
    handler.count_tokens = answering(handler.count_tokens)


def install_aliases(state: Any, records: Callable[[], Sequence[Record]]) -> None:
    """Accept `base:be_id` as a model name, list the aliases with their parent, and keep adapters from such names.

    vLLM looks among its adapters first, so one with an alias's name would answer the token's requests. Raises
    IncompatibleVLLM where the server was started with one; one that is loaded later is refused with 400.
    """
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse, ModelCard, ModelPermission

    models = state.openai_serving_models

    def is_alias(name: str) -> bool:
        # Whether the id exists is the hook's to say, with a better error.
        return split_alias(name, base_models(state)) is not None

    def taken(name: str) -> str:
        return f"The adapter {name!r} is named as a token's alias is (base model, colon, token); give it another name."

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

    async def resolve_lora(lora_name: str) -> Any:  # asks vLLM's resolver plugins, which may know any name
        return refused(lora_name) if is_alias(lora_name) else await original_resolve(lora_name)

    made: tuple[Sequence[Record], list[ModelCard]] = ([], [])

    async def show_available_models() -> Any:
        nonlocal made
        listed, found = await original_show(), records()
        if found is not made[0]:  # thousands of tokens may be registered, and anybody may ask
            parent = base_models(state)[0]
            permission = [ModelPermission()]
            cards = [
                ModelCard(id=alias_of(parent, one.id), root=one.digest, parent=parent, permission=permission)
                for one in found
            ]
            made = found, cards
        listed.data.extend(made[1])
        return listed

    models.is_base_model = is_base_model
    models.load_lora_adapter = load_lora_adapter
    models.resolve_lora = resolve_lora
    models.show_available_models = show_available_models


def api_keys(args: Any) -> list[str]:
    """vLLM's own API keys, by option or environment."""
    given = args.api_key or os.environ.get("VLLM_API_KEY") or []
    return [given] if isinstance(given, str) else [key for key in given if key]


def base_models(state: Any) -> list[str]:
    """Names under which the base model is served; empty before the server is up."""
    models = getattr(state, "openai_serving_models", None)
    return [path.name for path in models.base_model_paths] if models is not None else []


def close_raw_embeddings(state: Any, engine_client: Any) -> None:
    """Keep the engine's embeddings input for tokens alone.

    The engine runs with `--enable-prompt-embeds`; from here on the API process says
    it does not, so vLLM itself refuses client embeddings. Its placeholder token,
    whose id lies outside the model's vocabulary, is refused wherever ids are checked.
    """
    from vllm.exceptions import VLLMValidationError

    config = engine_client.model_config
    if not config.enable_prompt_embeds:
        raise IncompatibleVLLM(
            "The engine was started without --enable-prompt-embeds, which injection `prompt-embeds` needs, and without "
            "rows for tokens. `be-serve serve` adds what is needed; a plain vLLM command must name the flag, or "
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
            raise VLLMValidationError(f"The text {EMBEDS_MARKER} is reserved on this server.", parameter=parameter)

    base.validate_token_ids = validate_token_ids


def max_prompt_chars(state: Any) -> int:
    """Most characters that can fit the context: vLLM's bound before tokenisation."""
    base = state.online_renderer.renderer
    return int(base.model_config.max_model_len * base.get_tokenizer().max_chars_per_token)


def model_folder(engine_client: Any) -> Path:
    """The folder of the served model's files, from the local cache where it is a hub name."""
    config = engine_client.model_config
    folder = Path(config.model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    # vLLM has just downloaded it; nothing is fetched here.
    return Path(
        snapshot_download(
            config.model,
            revision=config.revision,
            local_files_only=True,
            allow_patterns=["*.json", "*.jinja", "*.safetensors", "tokenizer.model", "*.txt"],
        )
    )
