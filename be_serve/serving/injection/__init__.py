"""Brings vectors to the engine. Knows nothing of HTTP, token names or vLLM.

base           the interface of an injection
prompt_embeds  vectors are sent with each request, as vLLM prompt embeds
resident_rows  vectors stay on the workers; a request contains the ids of their rows
row_pool       assigns rows to tokens, and queues requests that need rows
byte_budget    limits the memory of running requests
vectors        a token's vectors in the serving dtype
"""
