"""Where a card is and where its PIN comes from, as settings files say it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dom0_middleware.settings import CardSettings
from gose.racs.settings import HostedElementSettings
from gose.settings import SecureElementSettings
from secfunet.card import Segmentation
from secfunet.card.errors import CardFormatError
from secfunet.card.place import PcscPlace
from secfunet.service.credentials import NoCredentialsError
from secfunet.service.files import UnsafeFileError
from secfunet.service.settings import SettingsError, load_settings
from secure_element.settings import CardSettings as SoftwareCardSettings


def card(tmp_path: Path, text: str) -> CardSettings:
    """The table of a hypervisor's card."""
    path = tmp_path / "card.toml"
    path.write_text(text)
    return load_settings(CardSettings, path)


def secret(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.touch(mode)
    path.write_bytes(content)
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        ('pcsc = "ACS ACR39U 00 00"', PcscPlace("ACS ACR39U 00 00")),
        ('pcsc = { reader = "A", daemon = "run/p.comm" }', "beside the file"),
        ('pcsc = { reader = "A", segmentation = "draft" }', PcscPlace("A", None, Segmentation.DRAFT)),
        ('socket = "/run/card.sock"', Path("/run/card.sock")),
    ],
)
def test_a_card_has_a_socket_or_a_reader(tmp_path: Path, lines: str, place: object) -> None:
    settings = card(tmp_path, f'{lines}\nuser_pin_file = "pin"\n')
    assert settings.place == (PcscPlace("A", tmp_path / "run/p.comm") if place == "beside the file" else place)
    assert settings.card_segmentation is (place.segmentation if isinstance(place, PcscPlace) else Segmentation.EXTENDED)


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('user_pin_file = "pin"', "either a 'socket' or 'pcsc'"),
        ('socket = "a"\npcsc = "b"\nuser_pin_file = "pin"', "either a 'socket' or 'pcsc'"),
        ('pcsc = ""\nuser_pin_file = "pin"', "must not be empty"),
        ('pcsc = "a\\u0000"\nuser_pin_file = "pin"', "printable"),
        ('pcsc = { name = "a" }\nuser_pin_file = "pin"', "unknown key 'pcsc.name'"),
        ('socket = "a"', "exactly one of 'user_pin_file', 'user_pin_credential' and 'user_pin_prompt'"),
        ('socket = "a"\nuser_pin_file = "pin"\nuser_pin_prompt = true', "exactly one of 'user_pin_file'"),
        ('socket = "a"\nuser_pin_credential = "../pin"', "is the name of a credential, not a path"),
        ('socket = "a"\nuser_pin = "1234"', "unknown key 'user_pin'"),
    ],
)
def test_what_settings_may_not_say(tmp_path: Path, lines: str, problem: str) -> None:
    with pytest.raises(SettingsError) as refused:
        card(tmp_path, lines)
    assert problem in str(refused.value)


def test_every_kind_of_card_may_be_in_a_reader() -> None:
    """A card of a grid, one that a node lends, and a software card that finds itself there."""
    element = SecureElementSettings.model_validate(
        {"seid": "web", "pcsc": "A", "role": "vm", "user_pin_credential": "web-pin"}
    )
    assert element.place == "pcsc:A"
    assert HostedElementSettings.model_validate({"seid": "web", "pcsc": "A"}).place == PcscPlace("A")
    store = {"store": "s", "store_key": {"prompt": True}}
    software = SoftwareCardSettings.model_validate({"attach": "[::1]:35963", "pcsc": "A", **store})
    assert (software.reader_address, software.place) == (("::1", 35963), PcscPlace("A"))
    for wrong in ({}, {"socket": "a", "attach": "127.0.0.1:1"}, {"socket": "a", "pcsc": "A"}, {"attach": "0.0.0.0:1"}):
        with pytest.raises(ValueError):
            SoftwareCardSettings.model_validate({**wrong, **store})


def test_a_pin_is_read_from_its_file(tmp_path: Path) -> None:
    settings = card(tmp_path, 'socket = "a"\nuser_pin_file = "pin"\n')
    path = secret(tmp_path / "pin", b"1234\n")
    assert settings.read_pin() == b"1234"
    secret(path, b"5678\n")
    assert settings.read_pin() == b"5678", "as it is now: a corrected PIN heals the card"
    path.chmod(0o640)
    with pytest.raises(UnsafeFileError):
        settings.read_pin()


def test_a_pin_is_a_credential_of_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = card(tmp_path, 'pcsc = "A"\nuser_pin_credential = "card-pin"\n')
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(NoCredentialsError, match="card-pin"):
        settings.read_pin()
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path / "credentials"))
    secret(tmp_path / "credentials" / "card-pin", b"1234\n", 0o440)  # the mask of systemd's ACL
    assert settings.read_pin() == b"1234"


def test_a_typed_pin_is_nowhere_to_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = card(tmp_path, 'pcsc = "A"\nuser_pin_prompt = true\n')
    with pytest.raises(CardFormatError, match="only 'serve' asks"):
        settings.read_pin()
    monkeypatch.setattr("getpass.getpass", lambda prompt: "13571357")
    monkeypatch.setattr("click.termui.hidden_prompt_func", lambda prompt: "13571357")
    settings.ask_for_pin("the card")
    assert settings.read_pin() == b"13571357"
    assert "13571357" not in repr(settings) + str(settings) + settings.model_dump_json()
