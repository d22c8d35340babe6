"""be-serve: one learned input embedding in place of a long system prompt.

The package is light at import: no torch, no vLLM. See `be_serve.core` for the
token file, `be_serve.registry` for the store, `be_serve.serving` for the vLLM
plugin and `be_serve.cli` for the command line.
"""

__version__ = "0.1.0"
