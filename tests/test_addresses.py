"""One function reads addresses, as people write them."""

import socket

import pytest

from consilium.addresses import Address, parse_address, parse_host
from consilium.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host", "port", "shown", "here", "loopback"),
    [
        ("127.0.0.2:8791", "127.0.0.2", 8791, "127.0.0.2:8791", "127.0.0.2", True),
        ("[::1]:8792", "::1", 8792, "[::1]:8792", "::1", True),
        ("0.0.0.0:1", "0.0.0.0", 1, "0.0.0.0:1", "127.0.0.1", False),
        ("[::]:65535", "::", 65535, "[::]:65535", "::1", False),
        ("localhost:80", "localhost", 80, "localhost:80", "localhost", True),
        (" Fed.Example.org.:8000 ", "fed.example.org", 8000, "fed.example.org:8000", "fed.example.org", False),
        ("München.example.org:8000", "xn--mnchen-3ya.example.org", 8000, "xn--mnchen-3ya.example.org:8000",
         "xn--mnchen-3ya.example.org", False),
        ("[2001:DB8::0005]:9", "2001:db8::5", 9, "[2001:db8::5]:9", "2001:db8::5", False),
    ],
)  # fmt: skip
def test_addresses(text, host, port, shown, here, loopback):
    found = parse_address(text)
    assert found == Address(host, port) and str(found) == shown and parse_address(shown) == found
    assert found.from_here == Address(here, port) and found.is_loopback == loopback


@pytest.mark.parametrize(
    ("text", "says"),
    [("", "--server is missing; it must be HOST:PORT"), ("10.0.0.7", "it must be HOST:PORT"), (":80", "HOST:PORT"),
     ("a:0", "the port is '0', it must be 1 to 65535"), ("a:65536", "1 to 65535"), ("a:x", "1 to 65535"),
     ("a:８０", "1 to 65535"), ("a:-1", "1 to 65535"), ("::1:8792", "an IPv6 address needs brackets"),
     ("https://fed.example.org:80", "needs brackets, and a URL is none"), ("10.0.0.256:80", "is no IPv4 address"),
     ("127.1:80", "is no IPv4 address"), ("a b:80", "neither an IP address nor the name"), ("-a:80", "neither an IP"),
     ("[fe80::1%eth0]:80", "leave out the zone, %eth0"), ("[abc]:80", "neither an IP address"),
     ("*.a.org:80", "neither"),
     ("u@a:80", "give the host alone"), ("a..b:80", "neither an IP"), (f"{'a' * 64}:80", "neither an IP")],
)  # fmt: skip
def test_what_is_no_address_is_refused(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_address(text, "--server")
    assert says in str(caught.value) and str(caught.value).startswith("--server is ")


@pytest.mark.parametrize(
    ("text", "says"),
    [("10.0.0.5:8000", "without a port"), ("https://fed.example.org", "no URL"), ("fed.example.org/x", "no URL"),
     ("a.*.org", "neither"), ("☃☃\u200b.org", "no name of a host")],
)  # fmt: skip
def test_what_is_no_host_is_refused(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_host(text, wildcard=True)
    assert parse_host("*.Example.org", wildcard=True) == "*.example.org"


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "0.0.0.0", "localhost"])
def test_a_server_is_reached_where_it_listens(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with server:
        here = Address(host, server.getsockname()[1]).from_here
        socket.create_connection((here.host, here.port), timeout=5).close()
