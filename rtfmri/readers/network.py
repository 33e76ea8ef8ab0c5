"""Who may connect, and where a listener listens: the same rules for every network transport."""

import errno
import re
import socket
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from rtfmri.errors import SourceError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener listens."""

    host: str
    """As it was given, or 127.0.0.1."""
    port: int
    """0 lets the operating system choose a free one."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """The addresses from which connections are taken; loopback always is."""

    networks: tuple[IPv4Network | IPv6Network, ...] = ()

    def admits(self, host: str) -> bool:
        """Tell whether a peer with this numerical address may connect."""
        try:
            peer = ip_address(host)
        except ValueError:
            return False
        peer = getattr(peer, "ipv4_mapped", None) or peer
        return peer.is_loopback or any(peer in network for network in self.networks)


def parse_allowed(text: str) -> Allowed:
    """Read a query's ``allow``: addresses or networks, such as ``192.0.2.7,198.51.100.0/24``.

    Raises
    ------
    ValueError
        In words, what is allowed.
    """
    try:
        return Allowed(tuple(ip_network(part.strip()) for part in text.split(",")))
    except ValueError:
        raise ValueError("addresses or networks, such as 192.0.2.7,198.51.100.0/24") from None


def parse_address(target: str, default_port: int, allowed: Allowed | None = None) -> Address:
    """Read the ``//HOST:PORT`` of a listener's URI.

    Parameters
    ----------
    target : str
        What follows the scheme's colon: ``//127.0.0.1:11112``, ``//:9002``, ``//[::1]:9002`` or
        nothing. Without a host it is 127.0.0.1, without a port *default_port*.
    default_port : int
        The port that this protocol usually has.
    allowed : Allowed, optional
        Whom the URI's ``allow`` names.

    Raises
    ------
    SourceError
        If the address is malformed, or is not of this machine alone and nobody is allowed by name.
    """
    parts = re.fullmatch(r"(//)?(\[[0-9A-Fa-f:]+\]|[A-Za-z0-9.-]*)(:([0-9]{1,5}))?/?", target)
    port = default_port if parts is None or parts[4] is None else int(parts[4])
    if parts is None or port > 65535:
        raise SourceError(f"an address is //HOST:PORT, such as //127.0.0.1:11112; got {target!r}")
    host = parts[2].strip("[]") or LOOPBACK
    if not (_is_loopback(host) or (allowed and allowed.networks)):
        raise SourceError(
            f"{host} is open to other machines; name those that may connect, such as "
            "?allow=192.0.2.7 or ?allow=192.0.2.0/24"
        )
    return Address(host, port)


def listen(address: Address) -> socket.socket:
    """Return a socket that listens.

    Raises
    ------
    SourceError
        If that is not possible, naming the address.
    """
    try:
        info = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(info[4], family=info[0], backlog=socket.SOMAXCONN)
    except OSError as error:
        why = error.strerror
        if error.errno == errno.EADDRINUSE:
            why = f"port {address.port} is in use; end what listens there, or take another"
        raise SourceError(f"cannot listen on {address.host}:{address.port}: {why}") from None


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
