"""Parsing of hosts and ports as users write them: IPv4, IPv6 in brackets, and host names (international ones too)."""

import ipaddress
import re
from dataclasses import dataclass

import idna

from consilium.errors import ConfigError

__all__ = ["Address", "parse_address", "parse_host"]

_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_UNSPECIFIED = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Address:
    """A host and a port in 1..65535; an IPv6 host is stored without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def from_here(self) -> "Address":
        """Return the address at which a process on the same machine reaches a server that listens on this address."""
        return Address(_UNSPECIFIED.get(self.host, self.host), self.port)

    @property
    def is_loopback(self) -> bool:
        """Return True if the address can be reached from this machine only."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def parse_address(text: str, name: str = "address") -> Address:
    """Parse HOST:PORT.

    Args:
        name: the setting's name, for error messages.

    Raises:
        ConfigError: if the text does not have that form; the message says what to write.
    """
    text = text.strip()
    example = "it must be HOST:PORT, e.g. 0.0.0.0:8000, [::1]:8000 or fed.example.org:8000"
    if not text:
        raise ConfigError(f"{name} is missing; {example}")
    host, colon, port = text.rpartition(":")
    if not colon or not host:
        raise ConfigError(f"{name} is {text!r}; {example}")
    if not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 65536:
        raise ConfigError(f"{name} is {text!r}: the port is {port!r}, it must be 1 to 65535; {example}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"{name} is {text!r}: an IPv6 address needs brackets, and a URL is none; {example}")
    return Address(parse_host(host, name), int(port))


def parse_host(text: str, name: str = "host", wildcard: bool = False) -> str:
    """Return a host in canonical form: an IP address without brackets, or a name in lower-case ASCII.

    Args:
        name: the setting's name, for error messages.
        wildcard: whether the name may start with "*.".

    Raises:
        ConfigError: for a URL, for a host with a port, and for text that is neither an address nor a name.
    """
    host = text.strip()
    address_text = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(address_text)
    except ValueError:
        pass
    else:
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id:
            raise ConfigError(f"{name} is {text!r}: leave out the zone, %{address.scope_id}")
        return str(address)
    if "/" in host or "@" in host:
        raise ConfigError(f"{name} is {text!r}; give the host alone, e.g. fed.example.org, no URL")
    if ":" in host:
        raise ConfigError(
            f"{name} is {text!r}; give the host alone, without a port, and an IPv6 address as [2001:db8::5]"
        )
    star = "*." if wildcard and host.startswith("*.") else ""
    hostname = host.removeprefix(star).rstrip(".").lower()
    if not hostname.isascii():
        try:
            hostname = idna.encode(hostname, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError) as error:
            raise ConfigError(f"{name} is {text!r}, which is no name of a host: {error}") from error
    labels = hostname.split(".")
    if len(hostname) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise ConfigError(f"{name} is {text!r}, which is neither an IP address nor the name of a host")
    if labels[-1].isdecimal():
        raise ConfigError(f"{name} is {text!r}, which is no IPv4 address: that has four numbers of 0 to 255")
    return star + hostname
