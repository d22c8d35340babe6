"""Benchmarks of a running server, measured from the client's side.

    common/   client, servers, texts, statistics: what all share
    ttft/     time to first token
    load/     concurrent chats beside another server
    soak/     abuse at saturation, every answer compared
    gpu/      all of them, and training steps, on a GPU

They speak HTTP only. Of be-serve they know the core (token files, errors), so the
same code measures a server on this machine, in a container or far away.
"""
