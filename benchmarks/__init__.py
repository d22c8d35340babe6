"""Benchmarks of a running server: time to first token, measured from the client's side.

They speak HTTP only. Of be-serve they know the core (token files, errors), so the
same code measures a server on this machine, in a container or far away.
"""
