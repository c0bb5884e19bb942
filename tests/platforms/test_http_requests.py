from __future__ import annotations

import asyncio
import re
import socket
import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from feishu_bot.config import NetworkSettings
from feishu_bot.errors import ConfigError, Undeliverable
from feishu_bot.platforms import http_pool
from feishu_bot.platforms.connection import Connection
from feishu_bot.platforms.http_pool import HttpPool
from tests.platforms.raw_http import Line, connected, echo, end_time, fails, once, serving


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/a/b?c=d&e=f", "/a/b?c=d&e=f"),
        ("/a b?x=1 2", "/a%20b?x=1+2"),
        ("/ä?q=ü", "/%C3%A4?q=%C3%BC"),
        ("/a#b?c", "/a"),
        ("/a?b?c", "/a?b?c"),
        ("/100%", "/100%25"),
        ("/om_%2Fx%20", "/om_%2Fx%20"),
        ("/a\r\nX: y", "/aX:%20y"),
        ("/a HTTP/1.1\r\nHost: x\r\n\r\nGET /b", "/a%20HTTP/1.1Host:%20xGET%20/b"),
        ("/a\0\x7f\t", "/a%00%7F"),
        ("/\ud800", "/"),
        ("//other.example.test/x", "//other.example.test/x"),
        ("", "/"),
    ],
    ids=ascii,
)
async def test_a_path_is_one_target_and_nothing_else(way, path, target):
    async with serving(echo) as site, connected(site, way) as connection:
        assert (await connection.call("POST", path, b"x")).body == b"x"
        assert [request.first for request in site.requests] == [f"POST {target} HTTP/1.1"]
        assert "x" not in site.requests[0].headers


@pytest.mark.parametrize(
    ("prefix", "path", "target"),
    [
        ("/api", "/send", "/api/send"),
        ("/api/", "/send", "/api/send"),
        ("/", "/send", "/send"),
        ("/app/getToken", "", "/app/getToken"),
        ("/app/getToken/", "", "/app/getToken/"),
        ("/token?by=gateway", "", "/token?by=gateway"),
    ],
)
async def test_an_address_may_have_a_path_of_its_own(prefix, path, target):
    async with serving(echo) as site, connected(site, path=prefix) as connection:
        await connection.call("POST", path, b"x")
        assert site.requests[0].first == f"POST {target} HTTP/1.1"


async def test_what_a_request_says_of_itself():
    async with serving(echo) as site, connected(site) as connection:
        await connection.call("POST", "/", b"{}", authorization="Bearer t")
        await connection.call("POST", "/")
        await connection.call("GET", "/")
        await connection.call("DELETE", "/", b"body")
        common = {
            "host": site.url.removeprefix("http://"),
            "accept": "*/*",
            "accept-encoding": "identity",
            "user-agent": "feishu-bot",
            "content-type": "application/json; charset=utf-8",
        }
        assert [request.headers for request in site.requests] == [
            {**common, "authorization": "Bearer t", "content-length": "2"},
            {**common, "content-length": "0"},
            common,
            {**common, "content-length": "4"},
        ]


@pytest.mark.parametrize("secret", ["a\r\nX: y", "a\nb", "a\rb", "a\0b", "a\x7fb", "a\ud800"], ids=ascii)
async def test_credentials_that_no_header_can_hold_are_refused(way, secret):
    async with serving(echo) as site, connected(site, way) as connection:
        with pytest.raises(Undeliverable, match="header"):
            await connection.call("POST", "/", b"x", authorization=f"Bearer {secret}")
        assert not site.requests


async def test_credentials_may_be_of_any_script():
    async with serving(echo) as site, connected(site) as connection:
        await connection.call("POST", "/", b"x", authorization="Bearer 密钥ü")
        assert site.requests[0].headers["authorization"] == "Bearer 密钥ü"


@pytest.mark.parametrize(
    "method", ["GET / HTTP/1.1\r\nX: y\r\n\r\nGET", "", "get", "HEAD", "CONNECT"], ids=ascii
)
async def test_only_methods_that_are_known_are_sent(method):
    async with serving(echo) as site, connected(site) as connection:
        with pytest.raises(Undeliverable, match="method"):
            await connection.call(method, "/")
        assert not site.requests


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://api.example.test", "api.example.test"),
        ("http://api.example.test:80", "api.example.test"),
        ("https://API.example.test:443/x", "api.example.test"),
        ("https://api.example.test:80", "api.example.test:80"),
        ("http://api.example.test.:8080", "api.example.test:8080"),
        ("http://[::1]:8080", "[::1]:8080"),
        ("http://[::1]", "[::1]"),
        ("http://bücher.example.test", "xn--bcher-kva.example.test"),
    ],
)
async def test_the_host_is_named_as_the_address_has_it(url, host):
    request = HttpPool(url, tls=True)._request("GET", "/", None, None).decode()
    assert re.findall(r"Host: (.*)\r\n", request) == [host]


async def test_an_address_of_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    async with serving(echo, host="::1") as site, connected(site) as connection:
        assert (await connection.call("POST", "/", b"x")).body == b"x"
        assert site.requests[0].headers["host"] == site.url.removeprefix("http://")


@pytest.mark.parametrize("url", ["http://ä" + "a" * 70 + ".test", "http://[::1", "http://h:99999"], ids=ascii)
def test_an_address_that_cannot_be_is_a_mistake(url):
    with pytest.raises(ConfigError):
        Connection(url, None)


# ----------------------------------------------------------------------------------------------------------- TLS


def write_pem(path, *things):
    path.write_bytes(b"".join(things))
    return str(path)


def certificate(folder, *names):
    """Make an authority and a certificate of its for the names. Returns the server's context and the authority's file."""
    now = datetime.now(UTC)

    def signed(subject, key, issuer, issuer_key, *extensions):
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
        )
        for extension, is_critical in extensions:
            builder = builder.add_extension(extension, critical=is_critical)
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)

    authority, own = (
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]) for name in ("root", "server")
    )
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = signed(
        authority, root_key, authority, root_key, (x509.BasicConstraints(ca=True, path_length=None), True)
    )
    alternatives = [
        x509.IPAddress(ip_address(name)) if name[0].isdigit() else x509.DNSName(name) for name in names
    ]
    leaf = signed(own, key, authority, root_key, (x509.SubjectAlternativeName(alternatives), False))
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(write_pem(folder / "server.pem", leaf, secret))
    return context, write_pem(folder / "root.pem", root)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
async def test_tls_by_an_authority_of_ones_own(tmp_path, way, name):
    context, root = certificate(tmp_path, name)
    async with serving(echo, tls=context) as site:
        site.url = site.url.replace("127.0.0.1", name)
        async with connected(site, way, network=NetworkSettings(ca_file=root)) as connection:
            for size in (1, 100, 1_000_000):
                assert (await connection.call("POST", "/", b"x" * size)).body == b"x" * size
        assert len(site.lines) == 1
        await site.until(lambda: site.ended == 1)


async def test_a_body_without_a_length_may_end_with_a_tls_connection(tmp_path, way):
    context, root = certificate(tmp_path, "127.0.0.1")
    async with (
        serving(once(b"HTTP/1.1 200 OK\r\n\r\nhello"), tls=context) as site,
        connected(site, way, network=NetworkSettings(ca_file=root)) as connection,
    ):
        assert (await connection.call("POST", "/", b"x")).body == b"hello"


@pytest.mark.parametrize(("name", "trusted"), [("other.example.test", True), ("127.0.0.1", False)])
async def test_a_server_that_cannot_prove_its_name_is_sent_nothing(tmp_path, way, name, trusted):
    context, root = certificate(tmp_path, name)
    network = NetworkSettings(ca_file=root) if trusted else None
    async with serving(echo, tls=context) as site, connected(site, way, network=network) as connection:
        error = await fails(connection.call("POST", "/", b"x"))
        assert error.reason.startswith("no connection: ")
        assert not error.outcome_unknown
        assert not site.requests


async def test_a_server_that_does_not_speak_tls_is_sent_nothing(way):
    async def talk(line: Line) -> None:
        await line.reader.read(1)
        await line.send(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\nplain HTTP here")
        line.end()

    async with serving(talk) as site:
        site.url = site.url.replace("http:", "https:")
        async with connected(site, way) as connection:
            error = await fails(connection.call("POST", "/", b"x"))
            assert error.reason.startswith("no connection: ")
            assert not error.outcome_unknown


async def test_a_server_that_hangs_up_in_the_middle_of_tls_is_sent_nothing(way):
    async def talk(line: Line) -> None:
        await line.reader.read(1)
        line.end()

    async with serving(talk) as site:
        site.url = site.url.replace("http:", "https:")
        async with connected(site, way) as connection:
            assert not (await fails(connection.call("POST", "/", b"x"))).outcome_unknown


async def test_a_server_that_never_begins_tls_is_sent_nothing_and_left(monkeypatch):
    monkeypatch.setattr(http_pool, "_CONNECT_S", 0.02)

    async def talk(line: Line) -> None:
        await line.reader.read()  # to the end

    async with serving(talk) as site:
        site.url = site.url.replace("http:", "https:")
        async with connected(site) as connection:
            error = await fails(connection.call("POST", "/", b"x"))
            assert (error.reason, error.outcome_unknown) == ("no connection: TimeoutError", False)
        monkeypatch.setattr(http_pool, "_CONNECT_S", 600)
        async with connected(site) as connection:
            task = asyncio.create_task(connection.call("POST", "/", b"x"))
            await site.until(lambda: len(site.lines) == 2)
            end_time(connection)
            error = await fails(task)
            assert (error.reason, error.outcome_unknown) == ("no answer in time", False)
        await site.until(lambda: site.ended == 2)
