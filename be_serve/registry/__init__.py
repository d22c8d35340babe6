"""The store of tokens: SQL rows (`store`) and the in-memory view a server reads (`index`).

Knows nothing of HTTP, vLLM or torch.
"""

from be_serve.registry.index import TokenIndex
from be_serve.registry.store import Change, PutResult, Record, Registry

__all__ = ["Change", "PutResult", "Record", "Registry", "TokenIndex"]
