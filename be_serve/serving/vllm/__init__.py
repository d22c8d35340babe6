"""The only room that imports vLLM.

versions   which vLLM is installed, what is set before it loads
arguments  the injection that fits a model, and vLLM's arguments for it
launch     `vllm serve` in this process
hooks      what the API server's process changes in vLLM
rows       the API server's side of resident rows
engine     the workers' side of them
llm        `vllm.LLM` with tokens
offline    an engine without a server, in a process of its own
"""
