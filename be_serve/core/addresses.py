"""Finds out whether an address is this machine, and warns of keys that are sent in clear text.

Rules for the HTTP clients of be-serve:

- A request to this machine never uses a proxy.
- No client follows a redirect, because the key would be sent to the new address.
- To other machines, the client of the admin routes and that of teachers and judges use the proxy of the
  environment. `run-batch` and the benchmarks never use a proxy.
"""

from __future__ import annotations

import functools
import ipaddress
import socket
import sys
import unicodedata
from urllib.request import getproxies, proxy_bypass

from be_serve.core.errors import InputError
from be_serve.core.redaction import safe_url


def is_local(host: str) -> bool:
    """Whether a URL's host is this machine: localhost, *.localhost, a loopback or unspecified address.

    `host` must come from the URL parser of the HTTP client, so that it is the host the client connects to.
    Legacy forms of addresses, such as 127.1 and 2130706433, count too, because resolvers accept them.
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
    """Whether others can read a key that is sent to this address: no TLS, and another machine."""
    return scheme == "http" and not is_local(host)


@functools.cache
def warn_of_clear_text(scheme: str, host: str, *, by_proxy: bool = False) -> None:
    """Warn on standard error, once for each host, that a key is sent there in clear text.

    `by_proxy`: the client uses the proxy of the environment. The warning then names it, because it reads the key.
    """
    if is_exposed(scheme, host):
        proxies = getproxies() if by_proxy and not proxy_bypass(host) else {}
        proxy = proxies.get(scheme) or proxies.get("all")
        by = f", through the proxy {safe_url(proxy)}" if proxy else ""
        print(f"Warning: the key is sent to {host} in clear text{by}. Use an https:// URL.", file=sys.stderr)


def checked_key(key: str, source: str) -> str:
    """A key without white space around it. Raises InputError, which names `source`, if no HTTP header can hold it."""
    key = key.strip()
    if not key.isascii() or not key.isprintable():
        raise InputError(f"The server's key holds characters that an HTTP header cannot contain. Check {source}.")
    return key
