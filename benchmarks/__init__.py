"""Benchmarks of a running server, measured by an HTTP client.

    common/   shared code: client, servers, texts, statistics
    ttft/     time to first token
    load/     bursts of concurrent chats, compared with a second server
    soak/     overload with attacks; every answer is compared with a reference
    gpu/      all of these, and training steps, on a GPU

The benchmarks use HTTP and be_serve's core (token files, errors) only. The same code
measures a server on this machine, in a container or on another machine.
"""
