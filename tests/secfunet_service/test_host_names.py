"""One spelling of a name, whoever wrote it, and a sentence for what is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gose.settings import GoseSettings
from gose_client.settings import GoseClientSettings
from secfunet.host_names import HostNameError, canonical_host, canonical_url
from secfunet.openid.realm import same_url
from secfunet.service.settings import SettingsError, validate_settings

SAME = [
    ("LOCALHOST", "localhost"),
    ("Grid.Example.ORG.", "grid.example.org"),
    ("grid.exämple.org", "grid.xn--exmple-cua.org"),
    ("GRID.XN--EXMPLE-CUA.ORG", "grid.xn--exmple-cua.org"),
    ("127.0.0.1", "127.0.0.1"),
    ("::1", "::1"),
    ("2001:DB8:0:0::1", "2001:db8::1"),
]
NONE = [
    "",
    ".",
    "*.example.org",
    "-bad.example",
    "bad-.example",
    "a..b",
    "a_b",
    "127.1",
    "a b",
    "host:80",
    "a/b",
    "x" * 64,
    "host.7",
]


@pytest.mark.parametrize(("written", "meant"), SAME)
def test_one_spelling(written: str, meant: str) -> None:
    assert canonical_host(written) == meant
    assert canonical_host(meant) == meant


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_name_is_refused_when_settings_are_read(name: str) -> None:
    with pytest.raises(HostNameError):
        canonical_host(name)
    for raw in ({"names": [name]}, {"service_provider": {"public_host": name}}):
        with pytest.raises(SettingsError, match=r"wildcard|neither a DNS name nor"):
            validate_settings(GoseSettings, raw, Path("gose.toml"))


@given(st.text(max_size=80))
def test_any_text_is_a_name_in_one_spelling_or_an_error(text: str) -> None:
    try:
        name = canonical_host(text)
    except HostNameError:
        return
    assert canonical_host(name) == name
    assert name.isascii()
    assert name == name.lower()


@pytest.mark.parametrize(("written", "meant"), SAME)
def test_grid_and_dom0_mean_the_same_places(written: str, meant: str, tmp_path: Path) -> None:
    """However each of them was told the name: what one sends the other is compared as text."""
    grid = validate_settings(
        GoseSettings,
        {
            "names": [written],
            "service_provider": {"https": "127.0.0.1:443", "grpc": "127.0.0.1:8444", "openid_provider": None},
            "openid_provider": {"endpoint": "127.0.0.1:9443", "login": "127.0.0.1:9444"},
        },
        tmp_path / "gose.toml",
    )

    def dom0(name: str) -> GoseClientSettings:
        host = f"[{name}]" if ":" in name else name
        return validate_settings(
            GoseClientSettings,
            {
                "service_provider": f"HTTPS://{host}",
                "operations": f"{host}:443",
                "openid_provider": f"https://{host}:9443/",
                "openid_login": f"https://{host}:9444",
                "authority": "ca.pem",
            },
            tmp_path / "dom0.toml",
        )

    for name in (written, meant, meant.upper()):
        assert dom0(name).service_provider == grid.audience
        assert dom0(name).operations.removesuffix(":443") in (meant, f"[{meant}]")
        assert dom0(name).openid_provider == canonical_url(
            f"https://[{meant}]:9443" if ":" in meant else f"https://{meant}:9443"
        )


def test_realms_are_urls_and_not_text(tmp_path: Path) -> None:
    raw = {
        "openid_provider": {"realms": ["https://LOCALHOST:18400", "https://*.Exämple.org", "https://a.example:443/x"]}
    }
    settings = validate_settings(GoseSettings, raw, tmp_path / "gose.toml")
    assert settings.openid_provider.realms == (
        "https://localhost:18400/",
        "https://*.xn--exmple-cua.org/",
        "https://a.example/x",
    )
    for realm in ("localhost", "https://*.org", "https://u@localhost", "https://localhost/?q", "ftp://localhost"):
        with pytest.raises(SettingsError):
            validate_settings(GoseSettings, {"openid_provider": {"realms": [realm]}}, tmp_path / "gose.toml")


def test_urls_are_compared_as_urls() -> None:
    assert same_url("https://LocalHost.:443", "https://localhost/")
    assert same_url("https://[::0001]:1/id", "https://[::1]:1/id")
    assert not same_url("https://localhost/ID", "https://localhost/id")
    assert not same_url("nothing", "nothing")
