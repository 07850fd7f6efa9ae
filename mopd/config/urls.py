"""Which URLs a server may have."""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

METADATA_HOSTS = {"metadata.google.internal", "metadata.goog", "metadata", "instance-data"}
METADATA_ADDRESSES = {
    ipaddress.ip_address(address)
    for address in ("169.254.169.254", "100.100.100.200", "192.0.0.192", "fd00:ec2::254")
}
HOST_NAME = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_-]+)*")
# An IPv4 address in a spelling that resolvers take and a reader does not see through.
ODD_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]*|[0-9]+)(\.(0[xX][0-9a-fA-F]*|[0-9]+))*")


def checked_url(url: str) -> str:
    """The base URL without a trailing slash.

    Raises:
        ValueError: anything but http(s) to a plain host; link-local and metadata addresses.
    """
    if re.search(r"[\x00-\x20\x7f-\uffff\\]", url):
        raise ValueError("has a space, a control or non-ASCII character, or a backslash")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL ({error})") from error
    if parts.scheme not in ("http", "https"):
        raise ValueError("must begin with http:// or https://")
    if "@" in parts.netloc:
        raise ValueError("has a user name or password; name an environment variable: api_key_env")
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise ValueError("has a query or a fragment; give the base URL only")
    if not host or port == 0:
        raise ValueError("has no host or port 0")
    if ".." in parts.path or "%" in parts.netloc + parts.path:
        raise ValueError("has `..` or an escape in it; give the base URL plainly")
    _check_host(host)
    return url.rstrip("/")


def _check_host(host: str) -> None:
    name = host.rstrip(".").lower()
    if name in METADATA_HOSTS:
        raise ValueError("is a cloud metadata service")
    try:
        check_address(name)
    except ipaddress.AddressValueError:
        if ODD_NUMBER.fullmatch(name) or not HOST_NAME.fullmatch(name):
            raise ValueError("has a host that is neither a name nor an address") from None


def check_address(text: str) -> None:
    """Raises ValueError for an address that no teacher has; AddressValueError: no address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise ipaddress.AddressValueError(str(error)) from error
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo or (None, None))[1]
        address = inner or address
    if address in METADATA_ADDRESSES:
        raise ValueError("is a cloud metadata address")
    if address.is_link_local or address.is_multicast or address.is_unspecified:
        raise ValueError("is a link-local, multicast or unspecified address")
