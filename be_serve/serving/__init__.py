"""The vLLM plugin. Only `vllm_compat` imports vLLM.

request -> middleware -> vLLM's chat endpoint -> hook -> resolve -> inject -> engine
                                                  |
                                       routes, metrics, settings
"""
