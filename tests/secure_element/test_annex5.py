"""The mini session of draft-urien-eap-smartcard, annex 5, byte for byte, as far as it is not EAP-MD5."""

from __future__ import annotations

from pathlib import Path

from secfunet.card import KeyAlgorithm
from secfunet.card.profile import CardProfile
from secure_element.applet import CardOptions
from secure_element.card_os import CardOs
from secure_element.segmentation import AnswerStyle
from tests.support.local_card import new_store, personalised
from tests.support.pki import CertificateAuthority


def exchange(card: CardOs, command: str) -> str:
    return card.process(bytes.fromhex(command)).hex().upper()


async def test_mini_session(tmp_path: Path) -> None:
    card = await personalised(new_store(tmp_path), CertificateAuthority(), ("abcd", KeyAlgorithm.P_256))
    for command, response in (
        ("A018000000", "6999"),  # nothing is selected yet
        ("00A4040007 11223344556601", "9000"),
        ("A018000000", "6303"),
        ("A020000008 31313131FFFFFFFF", "6302"),
        ("A020000008 30303030FFFFFFFF", "9000"),
        ("A018000000", "6C04"),
        ("A018000004", "616263649000"),
        ("A017000100", "6C04"),
        ("A017000104", "616263649000"),
        ("A019000001", "019000"),
        ("A016008004 61626364", "9000"),
        ("A019000001", "049000"),
        ("A080000005 01A5000501", "6109"),
        ("A0C0000009", "02A5000901616263649000"),
        ("A0C0000009", "6985"),
        ("A019100000", "9000"),
        ("A019000001", "029000"),
        ("A080000005 FFFFFFFFFF", "7000"),
        ("A0160080 04 7A7A7A7A", "6985"),  # no such identity
        ("A0FF000000", "6D00"),
        ("C018000000", "6E00"),
        ("A018FF0000", "6B00"),
        ("A0180000 0500", "6700"),
    ):
        assert exchange(card, command) == response, command


async def test_docking_start_is_answered_with_a_client_hello(tmp_path: Path) -> None:
    card = await personalised(new_store(tmp_path), CertificateAuthority(), ("abcd", KeyAlgorithm.P_256))
    for command in ("00A404000711223344556601", "A02000000830303030FFFFFFFF", "A01600800461626364", "A019100000"):
        assert exchange(card, command) == "9000"
    # Start with the Unix time behind it, as in annex 6.
    status = exchange(card, "A08000000A 011400060D20 3FAA2B6A")
    assert status == "9F00" or status.startswith("61")
    answer = b""
    while status[-4:-2] in ("9F", "61"):
        status = exchange(card, ("A0120000" if status[-4:-2] == "9F" else "A0C00000") + status[-2:])
        answer += bytes.fromhex(status[:-4])
    assert status[-4:] == "9000"
    assert answer[:2] == b"\x02\x14"
    assert int.from_bytes(answer[2:4]) == len(answer)
    assert answer[4:6] == b"\x0d\x80"
    assert int.from_bytes(answer[6:10]) == len(answer) - 10
    assert answer[10] == 0x16


async def test_extended_apdus_and_iso_style(tmp_path: Path) -> None:
    authority = CertificateAuthority()
    options = CardOptions(answers=AnswerStyle.ISO)
    card = await personalised(new_store(tmp_path), authority, ("abcd", KeyAlgorithm.P_256), options=options)
    exchange(card, "00A404000AF053656346754E657401")
    exchange(card, "A02000000830303030FFFFFFFF")
    assert exchange(card, "A018000000") == "616263649000"
    first = exchange(card, "A01A000000")
    assert len(first) == 2 * 258
    assert first[-4:-2] == "61"
    second = exchange(card, "00C0000000")
    assert second[-4:] == "9000" or second[-4:-2] == "61"
    whole = bytes.fromhex(exchange(card, "A01A0000000000"))
    assert whole[-2:] == b"\x90\0"
    profile = CardProfile.decode(whole[:-2])
    assert profile.eap_id == b"abcd"
    assert profile.authorities == (authority.der,)
    assert whole.hex().upper().startswith(first[:-4])
