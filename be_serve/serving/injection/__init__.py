"""How vectors reach the engine. It knows nothing of HTTP, of names or of vLLM.

base           the seam: what a way of injecting must do
prompt_embeds  vectors travel with each request, as vLLM prompt embeds
resident_rows  vectors lie on the workers, a request names their rows
row_pool       who has which rows, who waits
byte_budget    memory that requests in flight may hold
vectors        a token's vectors in the serving dtype
"""
