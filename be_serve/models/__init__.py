"""Finds a model's files: in a local folder, in a GGUF file, by a Hugging Face name, or of a `builtin:` model.

Knows nothing of tokens. Reads weights only as safetensors. The one exception is `convert`,
which reads a GGUF file in its own process.
"""

from be_serve.models.builtin import DEFAULT_MODEL
from be_serve.models.gguf import is_gguf
from be_serve.models.resolve import ResolvedModel, be_home, resolve_model

__all__ = ["DEFAULT_MODEL", "ResolvedModel", "be_home", "is_gguf", "resolve_model"]
