"""Where a model's files are: a local folder, a Hugging Face name, or a `builtin:` model.

Knows nothing of tokens. Weights are only ever read as safetensors, apart from the
one conversion in `convert`, which runs in a process of its own.
"""

from be_serve.models.builtin import DEFAULT_MODEL
from be_serve.models.resolve import ResolvedModel, be_home, resolve_model

__all__ = ["DEFAULT_MODEL", "ResolvedModel", "be_home", "resolve_model"]
