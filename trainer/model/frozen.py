"""The frozen model in three parts: embed, body, head. It knows nothing of tokens or losses."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from be_serve.core.errors import InputError
from be_serve.core.fingerprint import Fingerprint, fingerprint_folder
from be_serve.core.slots import SlotRenderer, pinned_template_kwargs
from trainer.model import row_packing, shared_prefix
from trainer.model.memory import free_bytes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Above this length the eager attention's T x T scores cost more memory than they save time.
_EAGER_LENGTH = 640
# Slices of a head's weights that are converted to another dtype take this many bytes each.
_SLICE_BYTES = 1 << 25
_SENTENCE = "The harbour lies behind the hill, and every boat that comes in at night is met by a man with a lamp."


@dataclass
class FrozenModel:
    """A causal LM whose weights never change, with its tokenizer and slots.

    model = FrozenModel.load(folder, name="Qwen/Qwen3-4B")
    hidden_BTH = model.body(model.embed(ids_BT))
    logits_BTV = model.head(hidden_BTH)
    """

    causal_lm: Any
    tokenizer: Any
    slots: SlotRenderer
    name: str
    fingerprint: Fingerprint
    template_kwargs: dict[str, Any]
    revision: str | None = None
    _shares_prefix: bool | None = None
    _packs_rows: bool | None = None
    _exact_head: Tensor | None = None

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        name: str,
        revision: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        template_kwargs: dict[str, Any] | None = None,
    ) -> FrozenModel:
        """Load a Hugging Face folder. Raises InputError where it holds no usable causal LM."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = DTYPES["bfloat16" if dtype == "auto" else dtype]
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            causal_lm = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen).to(device)
        except (OSError, ValueError, RuntimeError) as exc:
            raise InputError(f"Cannot load {name} from {folder}: {exc}") from exc
        finally:
            if shown:
                logging.enable_progress_bar()
        causal_lm.eval().requires_grad_(False)
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{name} has no chat template; choose an instruct model.")
        if template_kwargs is None:
            template_kwargs = pinned_template_kwargs(str(tokenizer.chat_template))
        model = cls(
            causal_lm,
            tokenizer,
            SlotRenderer(tokenizer),
            name,
            fingerprint_folder(folder),
            template_kwargs,
            revision,
        )
        model._check_parts()
        return model

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def embedding(self) -> Any:
        return self.causal_lm.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        return int(self.embedding.weight.shape[1])

    @property
    def vocab_size(self) -> int:
        return int(self.embedding.weight.shape[0])

    @functools.cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the input rows' numbers: .136 for one model, .017 for another."""
        with torch.no_grad():
            parts = torch.arange(self.vocab_size).split(16_384)
            squares = sum(float(self.embed(part).float().square().sum()) for part in parts)
        return math.sqrt(squares / self.embedding.weight.numel())

    @property
    def max_length(self) -> int:
        return int(getattr(self.causal_lm.config.get_text_config(), "max_position_embeddings", 1 << 30))

    def embed(self, ids: Sequence[int] | Sequence[Sequence[int]] | Tensor) -> Tensor:
        """Input rows [..., H] as the body sees them; an embedding's own scaling is included."""
        return self.embedding(torch.as_tensor(ids, dtype=torch.long, device=self.device))

    def body(self, inputs_BTH: Tensor, **kwargs: Any) -> Tensor:
        """Final hidden states [B, T, H], after the last norm and before the head."""
        kwargs.setdefault("use_cache", False)
        return self.causal_lm.base_model(inputs_embeds=inputs_BTH, **kwargs).last_hidden_state

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of final hidden states, in the dtype of `hidden`.

        A float32 `hidden` on a bfloat16 model gives float32 logits: rounding the
        logits themselves costs about 1e-3 nats of KL.
        """
        layer = self.causal_lm.get_output_embeddings()
        if layer.weight.dtype == hidden.dtype:
            logits = layer(hidden)
        else:
            exact = self._exact_head
            kept = exact is not None and exact.dtype == hidden.dtype
            logits = _linear(hidden, exact if kept else layer.weight, getattr(layer, "bias", None))
        config = self.causal_lm.config.get_text_config()
        if scale := getattr(config, "logit_scale", None):  # Cohere
            logits = logits * scale
        if scaling := getattr(config, "logits_scaling", None):  # Granite
            logits = logits / scaling
        if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
            logits = torch.tanh(logits / cap) * cap
        return logits

    @contextlib.contextmanager
    def exact_head(self) -> Iterator[None]:
        """While open, keep a float32 copy of the head for `head` of float32 states, where memory has room for two.

        On a CPU, float32 products of a bfloat16 model go through its bfloat16 units meanwhile, in less than half the
        time: weights and states are bfloat16 numbers, and their products are added up in float32 all the same.
        """
        weight = self.causal_lm.get_output_embeddings().weight
        free = free_bytes(weight.device)
        room = free is not None and free > 2 * 4 * weight.numel()
        copied = weight.dtype != torch.float32 and self._exact_head is None and room
        if copied:
            self._exact_head = weight.to(torch.float32)
        precision = torch.get_float32_matmul_precision()
        if weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
            torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
            if copied:
                self._exact_head = None

    def stop_ids(self) -> list[int]:
        """Ids that end an assistant turn."""
        config = getattr(self.causal_lm, "generation_config", None)
        found: set[int] = set()
        for value in (getattr(config, "eos_token_id", None), self.tokenizer.eos_token_id):
            found.update([value] if isinstance(value, int) else value or [])
        return sorted(found)

    @contextlib.contextmanager
    def fast_backward(self, length: int) -> Iterator[None]:
        """Eager attention on the CPU for short inputs: its backward pass takes half the time of SDPA's."""
        config = self.causal_lm.config
        before = getattr(config, "_attn_implementation", None)
        if self.device.type != "cpu" or length > _EAGER_LENGTH or before != "sdpa":
            yield
            return
        self.causal_lm.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.causal_lm.set_attn_implementation(before)

    @contextlib.contextmanager
    def checkpointed(self) -> Iterator[None]:
        """While open, a forward pass keeps each layer's input alone and computes the layer again in the backward pass.

        transformers' own switch works in training mode, which brings dropout: here the model stays as it is.
        A model whose layers are not made for it is left as it is, too.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        layers = [layer for layer in self.causal_lm.modules() if isinstance(layer, GradientCheckpointingLayer)]
        for layer in layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # the instance's own; the class's shows again

    def shares_prefix(self) -> bool:
        """Whether attention to a shared prefix works for this architecture; tried once."""
        if self._shares_prefix is None:
            self._shares_prefix = shared_prefix.works(self.causal_lm, self._sample())
        return self._shares_prefix

    def packs_rows(self) -> bool:
        """Whether rows may stand in one sequence without padding; tried once."""
        if self._packs_rows is None:
            self._packs_rows = row_packing.works(self.causal_lm, self._sample())
        return self._packs_rows

    def slow_ways(self) -> list[str]:
        """What this model is trained without, of the ways that were tried: same results, in more time."""
        ways = {
            "the prompt's keys and values are copied for each batch": self._shares_prefix,
            "rows of a batch are padded, not packed": self._packs_rows,
        }
        return [said for said, works in ways.items() if works is False]

    def _sample(self) -> Tensor:
        """Embeddings [T, H] of a sentence, to try things on: on ids that make no text rounding grows."""
        return self.embed(self.tokenizer.encode(_SENTENCE, add_special_tokens=False))

    def _check_parts(self) -> None:
        """Refuse an architecture whose parts do not compose to the whole."""
        ids = torch.arange(3, 11, device=self.device)[None] % self.vocab_size
        with torch.no_grad():
            whole = self.causal_lm(input_ids=ids, use_cache=False).logits.float()
            parts = self.head(self.body(self.embed(ids))).float()
        if whole.shape != parts.shape or not torch.allclose(whole, parts, rtol=0.02, atol=0.05):
            raise InputError(
                f"{self.name} ({type(self.causal_lm).__name__}) transforms its embeddings or logits in a way that "
                "the trainer does not know; it cannot be trained here."
            )


def _linear(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """`hidden` [..., H] times the weights in its own dtype; weights of another are converted in slices."""
    bias_V = None if bias_V is None else bias_V.to(hidden.dtype)
    if weight_VH.dtype == hidden.dtype:
        return torch.nn.functional.linear(hidden, weight_VH, bias_V)
    rows = max(1, _SLICE_BYTES // (hidden.element_size() * weight_VH.shape[1]))
    logits = hidden.new_empty(*hidden.shape[:-1], len(weight_VH))
    for start in range(0, len(weight_VH), rows):
        at = slice(start, start + rows)
        logits[..., at] = torch.nn.functional.linear(
            hidden, weight_VH[at].to(hidden.dtype), None if bias_V is None else bias_V[at]
        )
    return logits
