"""Which URLs a teacher may have: 60 cases."""

from __future__ import annotations

import pytest

from mopd.config.urls import checked_url

ALLOWED = [
    "http://127.0.0.1:8000",
    "http://localhost:8000",
    "http://localhost",
    "https://teacher.example.com",
    "https://teacher.example.com:8443/base",
    "http://10.0.0.7:8000",
    "http://192.168.1.20:8000",
    "http://172.16.0.1:1",
    "http://8.8.8.8:80",
    "http://[::1]:8000",
    "http://[fd12:3456::1]:8000",
    "http://node-3:8000",
    "http://node_3.cluster.local:8000",
    "http://teacher.default.svc.cluster.local:8000/v2",
    "http://TEACHER:8000",
    "https://a.b-c.d:65535",
    "http://169.253.1.1:8000",
    "http://h.:8000",
]
REFUSED = [
    "",
    "127.0.0.1:8000",
    "localhost",
    "//host:8000",
    "ftp://host",
    "file:///etc/passwd",
    "gopher://host:70",
    "unix:///run/socket",
    "javascript:alert(1)",
    "http://",
    "http:///path",
    "http://:8000",
    "http://host:0",
    "http://host:65536",
    "http://host:port",
    "http://user@host:8000",
    "http://user:secret@host:8000",
    "http://:secret@host",
    "http://127.0.0.1:8000@169.254.169.254",
    "http://host:8000?key=1",
    "http://host:8000#x",
    "http://host:8000?",
    "http://host:8000/#",
    "http://ho st:8000",
    " http://host:8000",
    "http://host:8000\n",
    "http://host\t:8000",
    "http://host\\@evil:8000",
    "http://h\u00f6st:8000",
    "http://host\x00:8000",
    "http://169.254.169.254",
    "http://169.254.0.9:8000",
    "http://169.254.169.254./",
    "http://[fe80::1]:8000",
    "http://[fe80::1%25eth0]:8000",
    "http://[fd00:ec2::254]",
    "http://[::ffff:169.254.169.254]:80",
    "http://[2002:a9fe:a9fe::1]:80",
    "http://100.100.100.200",
    "http://192.0.0.192",
    "http://metadata.google.internal",
    "http://METADATA.google.internal.",
    "http://metadata/computeMetadata",
    "http://instance-data/latest",
    "http://0.0.0.0:8000",
    "http://[::]:8000",
    "http://224.0.0.1",
    "http://2852039166",
    "http://0xA9FEA9FE",
    "http://0251.0376.0251.0376",
    "http://169.254.43518",
    "http://127.1:8000",
    "http://host%2eexample",
    "http://host/../admin",
    "http://host/%2e%2e/admin",
    "http://-host:8000",
    "http://host..name:8000",
    "http://[::1:8000",
]


@pytest.mark.parametrize("url", ALLOWED)
def test_a_plain_server_is_allowed(url: str) -> None:
    assert checked_url(url + "/") == url


@pytest.mark.parametrize("url", REFUSED)
def test_anything_else_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"\w+"):
        checked_url(url)


def test_there_are_enough_cases() -> None:
    assert len(ALLOWED) + len(REFUSED) >= 60
