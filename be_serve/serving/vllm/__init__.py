"""The only subpackage that imports vLLM.

versions   the installed vLLM version, and what is set before vLLM loads
arguments  the injection that fits a model, and vLLM's arguments for it
launch     runs `vllm serve` in this process
hooks      changes to vLLM in the API server's process
rows       resident rows in the API server's process
engine     resident rows in the worker processes
llm        `vllm.LLM` with tokens
offline    an engine without a server, in its own process
"""
