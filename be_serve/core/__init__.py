"""What trainer and server share: errors, ids, fingerprints, the token file, the slot.

Nothing here knows about torch, vLLM, HTTP or SQL.
"""
