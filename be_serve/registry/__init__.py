"""The store of tokens: a SQL database (`store`) and a server's in-memory copy of it (`index`).

Knows nothing of HTTP, vLLM or torch.
"""

from be_serve.registry.index import TokenIndex
from be_serve.registry.store import Change, PutResult, Record, Registry

__all__ = ["Change", "PutResult", "Record", "Registry", "TokenIndex"]
