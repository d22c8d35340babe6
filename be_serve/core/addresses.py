"""Which addresses are this machine's own, and where a key would travel in clear text.

The rule for our HTTP clients: what is sent to this very machine never goes by a proxy, and no client
follows a redirect, for keys would go with it. To other machines the client of the admin routes
and that of teachers and judges go by the environment's proxy; `run-batch` and the benchmarks
go directly wherever the server is.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import sys
import unicodedata


def is_local(host: str) -> bool:
    """Whether a URL's host is this machine: localhost, *.localhost, a loopback or unspecified address.

    `host` is the one that the client will connect to, as its own URL parser found it. Legacy forms
    of addresses, such as 127.1 and 2130706433, count: the resolver takes them.
    """
    name = unicodedata.normalize("NFKC", host).strip("[]").rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(name))
        except (OSError, UnicodeError, ValueError):
            return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def is_exposed(scheme: str, host: str) -> bool:
    """Whether a key on its way to this address can be read by others: no TLS, and another machine."""
    return scheme == "http" and not is_local(host)


@functools.cache
def warn_of_clear_text(scheme: str, host: str) -> None:
    """Say once for each host, on standard error, that a key travels there in clear text."""
    if is_exposed(scheme, host):
        print(f"Warning: the key travels to {host} in clear text. Use an https:// URL.", file=sys.stderr)
