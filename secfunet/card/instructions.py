"""The numbers of the commands that our EAP-TLS card knows; ``secure_element.commands`` documents them byte by byte."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

AID: Final = bytes.fromhex("F053656346754E657401")
"""Our applet: proprietary, F0 "SecFuNet" 01 written as F0 53 65 63 46 75 4E 65 74 01."""

AID_OF_DRAFT: Final = bytes.fromhex("11223344556601")
"""The example of draft-urien-eap-smartcard, annexes 5 and 7; our card answers to it as well."""

AID_OF_DOMAIN: Final = bytes.fromhex("A000000151000000")
"""The issuer security domain (GlobalPlatform Card Specification, H.1.3)."""

PIN_SIZE: Final = 8
"""A PIN on the wire, bytes: shorter ones are filled up with FF."""

MIN_PIN_SIZE: Final = 4

SEGMENT_SIZE: Final = 240
"""How much of a long command goes into one short APDU (as in the traces of the draft)."""

CHAINING: Final = 0x10
"""Bit of CLA: this command goes on in the next APDU (ISO 7816-4, 5.1.1.1)."""


class Cla(IntEnum):
    """Classes: ISO commands, those of the EAP draft, and our own."""

    ISO = 0x00
    KEYS = 0x80
    EAP = 0xA0


class Ins(IntEnum):
    """Instructions of class A0 (draft-urien-eap-smartcard) and SELECT."""

    FETCH = 0x12
    SET_IDENTITY = 0x16
    GET_NEXT_IDENTITY = 0x17
    GET_CURRENT_IDENTITY = 0x18
    STATE = 0x19
    GET_PROFILE_DATA = 0x1A
    VERIFY_PIN = 0x20
    CHANGE_PIN = 0x24
    UNBLOCK_PIN = 0x2C
    PROCESS_EAP = 0x80
    METHOD_FUNCTION = 0x82
    GET_EXPORTED_PARAMETER = 0x86
    SELECT = 0xA4
    GET_SESSION_KEY = 0xA6
    GET_RESPONSE = 0xC0


class MethodFunction(IntEnum):
    """P1 of instruction 82: our private extension for TLS-Tandem."""

    CIPHER_SUITE = 0xCA
    KEY_BLOCK = 0xCB
    SET_TLS_PARAMETERS = 0xCC
    PEER_CERTIFICATES = 0xCD


class KeyIns(IntEnum):
    """Instructions of class 80: the key pair and its personalisation."""

    OPERATE = 0x2A
    SEAL = 0x2C
    GENERATE_KEY = 0x46
    REQUEST_CERTIFICATE = 0x48
    BIND_IDENTITY = 0x4A
    GET_BINDING = 0x4C
    TRUST_TOKEN_AUTHORITY = 0x52
    GET_TOKEN_AUTHORITIES = 0x54
    LOAD_TOKEN = 0x56
    LIST_TOKENS = 0x58
    GET_TOKEN = 0x5A
    DELETE_TOKEN = 0x5C
    GET_CERTIFICATE = 0xCA
    LOAD_IDENTITY = 0xDA
    DELETE_IDENTITY = 0xE4


class DomainIns(IntEnum):
    """Instructions of GlobalPlatform, class 80 (84 in a secure channel); the first two are taken by the applet, too."""

    INITIALIZE_UPDATE = 0x50
    EXTERNAL_AUTHENTICATE = 0x82
    GET_DATA = 0xCA
    PUT_KEY = 0xD8
    STORE_DATA = 0xE2
    DELETE = 0xE4
    GET_STATUS = 0xF2


class KeyOperation(IntEnum):
    """P1 of instruction 2A of class 80; P2 is the number of the scheme or profile."""

    DECRYPT = 0x80
    UNWRAP_KEY = 0x82
    ENCRYPT = 0x86
    SIGN = 0x9E


class PersonalisationTag(IntEnum):
    """Items of the personalisation commands' data."""

    NAME = 1
    EAP_ID = 2
    CERTIFICATE = 3
    AUTHORITY = 4
    SUBJECT = 5
    HYPERVISOR = 6
