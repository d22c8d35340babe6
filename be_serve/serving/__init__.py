"""The vLLM plugin. It runs in the API server's process. Only the subpackage `vllm` imports vLLM.

request -> middleware -> vLLM's chat endpoint -> hook -> resolve -> injection -> engine
                                                  |
                                       routes, metrics, settings
"""
