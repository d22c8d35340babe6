"""The vLLM plugin. Only its `vllm_` modules import vLLM.

request -> middleware -> vLLM's chat endpoint -> hook -> resolve -> inject -> engine
                                                  |
                                       routes, metrics, settings
"""
