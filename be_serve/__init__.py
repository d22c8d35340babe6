"""be-serve: one learned input embedding in place of a long system prompt.

`import be_serve` imports neither torch nor vLLM. The token file is in `be_serve.core`, the store
in `be_serve.registry`, the vLLM plugin in `be_serve.serving`, the commands in `be_serve.cli`.
"""

__version__ = "0.1.0"
