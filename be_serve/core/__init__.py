"""The code that trainer and server share: errors, ids, fingerprints, the token file, the slot.

Imports no torch, vLLM, HTTP or SQL library.
"""
