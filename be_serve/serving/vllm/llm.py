"""`vllm.LLM` with tokens: the Python interface without a server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import vllm
from vllm.renderers import ChatParams

from be_serve.core.artifact import Token, check_vectors, file_digest, read_limited
from be_serve.core.errors import InputError, TokenNotFound, UnsupportedRequest
from be_serve.core.fingerprint import fingerprint_folder
from be_serve.core.ids import validate_be_id
from be_serve.core.slots import SlotRenderer, new_marker
from be_serve.models import resolve_model
from be_serve.registry import Record
from be_serve.serving.injection.prompt_embeds import mixed
from be_serve.serving.injection.vectors import join, prepare
from be_serve.serving.rendered import check_ids, prompt_text
from be_serve.serving.requests import BEFields, refuse_raw_embeddings, refuse_slips
from be_serve.serving.resolve import Resolution, Resolver
from be_serve.serving.vllm import engine
from be_serve.serving.vllm.versions import check_version

Chat = list[dict[str, Any]]


class LLM(vllm.LLM):  # type: ignore[misc]
    """A `vllm.LLM` whose method `chat` takes `be_id`.

        llm = LLM(DEFAULT_MODEL, tokens={"captain": "captain.safetensors"})
        outputs = llm.chat([{"role": "user", "content": "Who are you?"}], be_id="captain")

    `tokens` maps ids to token files. All other arguments are vLLM's own, except those that replace the model's
    tokenizer, chat template or config: these are refused. Vectors are sent as prompt embeds. On a CPU the
    engine runs in this process, where be-serve patches vLLM's sampler, unless VLLM_ENABLE_V1_MULTIPROCESSING=1.
    Raises InputError, InvalidArtifact or WrongModel before the engine starts, if a token cannot be used with
    the model.
    """

    def __init__(self, model: str, *, tokens: Mapping[str, str | Path], **options: Any) -> None:
        check_version()
        for name in ("chat_template", "tokenizer", "tokenizer_revision", "hf_overrides"):
            if options.get(name) is not None:
                raise InputError(
                    f"Tokens are trained for the model's own config, tokenizer and chat template; leave out `{name}`."
                )
        found = resolve_model(model, revision=options.get("revision"))
        self._tokens = _TokenFiles(tokens)
        fingerprint = fingerprint_folder(found.path)
        for token in self._tokens.files.values():
            # The fingerprint includes the embedding's shape, so the hidden size needs no check of its own.
            token.check_model(fingerprint, token.manifest.hidden_size, served=found.name)
        if engine.on_cpu():
            os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
            engine.patch_cpu_seed()
        super().__init__(model=str(found.path), **{**options, "enable_prompt_embeds": True})
        dtype = self.model_config.dtype
        for token in self._tokens.files.values():
            check_vectors(token.vectors, dtype=str(dtype).removeprefix("torch."))
        self._vectors = {be_id: prepare(token, dtype) for be_id, token in self._tokens.files.items()}
        self._resolver = Resolver(self._tokens, list)
        self._slots = SlotRenderer(self.get_tokenizer(), chat_template=self.chat_template)

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: Any = None,
        *args: Any,
        be_id: str | Sequence[str] | None = None,
        be_system: str | None = None,
        **options: Any,
    ) -> list[Any]:
        """vLLM's outputs for one or more chats, as `vllm.LLM.chat`. With `be_id`, tokens replace the system message.

        `be_system="append"` keeps a system message of the chat and places it after the tokens. With `be_id`,
        these options of vLLM are allowed: `use_tqdm`, `priority`, `tools`, `chat_template_kwargs` and
        `add_generation_prompt`. Raises RequestError, TokenNotFound.
        """
        refuse_slips(options, options, where="as an argument of `chat`")
        if be_id is None:
            if be_system is not None:
                raise UnsupportedRequest("`be_system` needs a `be_id`; give both or neither.", param="be_system")
            plain: list[Any] = super().chat(messages, sampling_params, *args, **options)
            return plain
        if args:
            raise UnsupportedRequest("With `be_id`, give all options by name.")
        given = {"be_id": be_id if isinstance(be_id, str) else list(be_id), "be_system": be_system}
        fields = BEFields.parse(given)
        chats: Sequence[Chat] = [messages] if messages and isinstance(messages[0], dict) else messages  # type: ignore
        rendering = {name: options.pop(name) for name in _RENDERING & options.keys()}
        others = {name for name, value in options.items() if value is not None} - _GENERATION
        if others:
            raise UnsupportedRequest(
                f"{', '.join(sorted(others))} cannot be used with a token; with `be_id` you can give "
                f"{', '.join(sorted(_RENDERING | _GENERATION))}."
            )
        options = {name: options[name] for name in _GENERATION & options.keys()}
        prompts = [self._prompt(fields, chat, rendering) for chat in chats]
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        for one in params if isinstance(params, Sequence) else [params]:
            if one.prompt_logprobs is not None:
                raise UnsupportedRequest(
                    "`prompt_logprobs` cannot be answered for a token, because a token has no text; leave it out."
                )
        if rendering.get("tools") or (rendering.get("chat_template_kwargs") or {}).get("enable_thinking"):
            self._adjust_params_for_parsing(self._params_to_seq(params, len(prompts)))  # as vLLM's own chat does
        outputs: list[Any] = self.generate(prompts, params, **options)
        return outputs

    def _prompt(self, fields: BEFields, chat: Chat, rendering: Mapping[str, Any]) -> dict[str, Any]:
        """vLLM's mixed prompt for one chat: token ids, with vectors at the token's place."""
        refuse_raw_embeddings(chat, rendering.get("tools"))
        resolution = self._resolver.resolve(fields, None, [dict(message) for message in chat])
        assert resolution is not None  # `fields` has a be_id
        tokens, marker = resolution.tokens, new_marker()
        text = self._text(resolution, marker, rendering)
        slot = self._slots.cut(text, marker, placement=tokens.placement)
        check_ids(slot, self.model_config.get_vocab_size())
        vectors = join([self._vectors[record.id] for record in tokens.records])
        embeds, is_token = mixed(slot, vectors)
        return {"prompt_embeds": embeds, "prompt_token_ids": slot.ids(tokens.k), "prompt_is_token_ids": is_token}

    def _text(self, resolution: Resolution, marker: str, rendering: Mapping[str, Any]) -> str:
        """The chat's text from vLLM's own renderer, with the marker in the token's place."""
        tokens = resolution.tokens
        marked = self._slots.mark(resolution.messages, marker, placement=tokens.placement, append=resolution.append)
        given = rendering.get("chat_template_kwargs") or {}
        if "chat_template" in given:
            raise UnsupportedRequest("A token was trained for the model's chat template; leave out `chat_template`.")
        # As in vLLM, an option given by name overrides `chat_template_kwargs`.
        kwargs = {
            **tokens.template_kwargs,
            **given,
            "add_generation_prompt": rendering.get("add_generation_prompt", True),
            "tools": rendering.get("tools"),
            "tokenize": False,
        }
        _, prompt = self.renderer.render_messages(
            marked, ChatParams(chat_template=self.chat_template, chat_template_kwargs=kwargs)
        )
        return prompt_text(prompt, media=False)


_RENDERING = {"tools", "chat_template_kwargs", "add_generation_prompt"}
_GENERATION = {"use_tqdm", "priority"}


class _TokenFiles:
    """Token files by their ids."""

    has_matches = False

    def __init__(self, tokens: Mapping[str, str | Path]) -> None:
        if not tokens:
            raise InputError("Give tokens={id: file}. Without tokens, use vllm.LLM.")
        data = {validate_be_id(be_id, param="tokens"): read_limited(file) for be_id, file in tokens.items()}
        self.files = {be_id: Token.from_bytes(raw) for be_id, raw in data.items()}
        self._records = {
            be_id: Record(be_id, 1, file_digest(data[be_id]), token.manifest, None, "server")
            for be_id, token in self.files.items()
        }

    def get(self, be_id: str) -> Record:
        """The record of an id. Raises TokenNotFound."""
        if be_id not in self._records:
            raise TokenNotFound(f"No token {be_id!r}; this LLM has: {', '.join(self._records)}.", param="be_id")
        return self._records[be_id]

    def match(self, sha256: str) -> None:
        """Always None: an `LLM` never matches a token by its prompt."""
