"""The vLLM plugin, in the API server's process. Only its room `vllm` imports vLLM.

request -> middleware -> vLLM's chat endpoint -> hook -> resolve -> injection -> engine
                                                  |
                                       routes, metrics, settings
"""
