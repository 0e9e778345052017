"""The card's command table: who may give which command. Numbers are in ``secfunet.card.instructions``.

Any command longer than one APDU may travel in segments: ISO chaining (CLA bit 10 in all but the last), and for Process-EAP also P1=01
(More) in all but the last; each answers 9000. Extended APDUs are taken too. An answer that does not fit is fetched by ``A0 C0 00 00 xx``
after 61xx and ``A0 12 00 00 xx`` after 9Fxx (either instruction does); 6Cxx asks for the same command with Le xx, and does not execute it
twice.

SELECT comes first (else 6999); ``00 A4 04 00 Lc AID``. ``ii`` (short identifier) is 00. PINs have 8 bytes on the wire, filled up with FF.

Class A0, draft-urien-eap-smartcard (PIN needed in brackets; 63 0n: n attempts left):

- ``20 00 00`` PIN: Verify-PIN. Without data: 63 0n, costs nothing. Blocked: 6983. ``2A`` means the same.
- ``24 00 00`` old new: Change-PIN. ``2C 00 00`` new PIN: Unblock-PIN [administrator]. There is no operator's PIN (P2 01): 6B00.
- ``16 00 80`` name: Set-Identity [user]. 6985: none of that name that is complete.
- ``18 00 00``: Get-Current-Identity; ``17 00 01`` next, ``17 00 02`` first [user or administrator]. 6A88: the card has none.
- ``18 01 00`` version of the EAP-TLS method, ``18 02 00`` of the engine (2 bytes; 02 is ours, 00 being taken).
- ``1A 00 00``: Get-Profile-Data [user or administrator], BER.
- ``19 00 00`` Get-State, ``19 10 00`` Reset-State [user].
- ``80 00|01 00`` EAP packet, Unix time (4 bytes, optional): Process-EAP [user]. 7000 discarded, 7001 or 6985 failed.
- ``A6 00 00``: Get-Session-Key [user]; Le 80: MSK ‖ EMSK, else the MSK of 64 bytes in the order that the settings say.
- ``86 00 00`` index: Get-Exported-Parameter [user].

Class A0, private extension for TLS-Tandem [user]:

- ``82 CA 00`` CipherSuite (``NegotiatedTls``), ``82 CB 00`` KeyBlock (once a handshake), ``82 CD 00`` Get-Peer-Certificates: in state 03
  only, else 6985.
- ``82 CC 00`` TlsParameters: Set-TLS-Parameters for the next handshake.

Class 80, the key pair. Personalisation [administrator]; data are items of tag (1), length (2), value: 01 name, 02 EAP-ID, 03
certificate, 04 authority (several), 05 subject's common name; DER; names are 1 to 32 printable ASCII characters:

- ``46 alg 00`` name: make a key pair; 01 RSA-2048, 02 RSA-3072, 03 RSA-4096, 04 P-256, 05 P-384. 6A89: the identity is complete already.
- ``48 00 00`` {01, 05}: certificate signing request, PKCS#10.
- ``DA 00 00`` {01, 02, 03, 04...}: load certificate and authorities. 6A80: not for this key, or no certificates.
- ``E4 00 00`` name: delete an identity and its key.
- ``CA 00 00``, or with a name: certificate of the current identity, or of that one [user or administrator].

A bound identity's results go to one hypervisor; then Operate and Process-EAP answer 6985:

- ``4A profile 00`` {01, 06 certificate of the hypervisor}: bind [administrator]; without 06: unbind. 6A81: its key is not RSA.
- ``4C 00 00``: profile (1), SHA-256 of that certificate; nothing if it is not bound [user or administrator].
- ``2C 00 00`` {01 time, 02 operation...}: do and seal [user]; {01 container, 02 failure...}. 6985: not bound.

Tokens of the current identity, out of containers that a trusted authority has made for its key (``secure_element.tokens``):

- ``52 01 00`` public key: trust an authority; ``52 00 00`` its SHA-256: no longer [administrator]. 6A80, 6A84; 6A88.
- ``54 00 00``: {01 SHA-256, last counter} of each trusted authority [user or administrator].
- ``56 profile 00`` container: Load-Token [user]. 6A80 for whatever is wrong with it, 6A84 no room; 6985 bound, 6A81 the key is not RSA.
- ``58 00 00``: List-Tokens [user], {01 counter, size, name}. ``5A 00 00`` name: Get-Token [user]. ``5C 00 00`` name: Delete-Token
  [user]. 6A88.

Operations with the current identity's key [user]; P2 is the number of the scheme in ``secfunet.gose.v1``:

- ``2A 9E scheme`` digest: sign. ``2A 80 scheme`` ciphertext: decrypt. ``2A 86 scheme`` plaintext: encrypt.
- ``2A 82 profile`` header: unwrap a container's content key (01 OAEP-SHA256, 02 PKCS#1 v1.5): 32 bytes. 6A80 for whatever is wrong;
  under profile 02 a header of the right length always yields 32 bytes, made up ones if its padding is wrong.
- 6A80 for lengths and values that do not fit, 6A81 for a scheme that the key cannot do.

GlobalPlatform, SCP03 (``secfunet.scp03``). While either application is selected:

- ``80 50 kvn 00`` host challenge (8): INITIALIZE UPDATE; ``84 82 level 00`` cryptogram, MAC: EXTERNAL AUTHENTICATE, not level 00.
  6982: refused.
- From then on every command has secure messaging (CLA bit 04; chained as ISO has it, not by the draft's More). One that has none, or is
  not the administrator's, closes the channel: 6982. So do SELECT and INITIALIZE UPDATE.

While the security domain (``A000000151000000``, or the empty AID) is selected; [administrator] but for GET DATA:

- ``80 D8 old 81`` key set: PUT KEY. 6A88 no such set to replace, 6985 its version is another's, 6A84 four sets, 6A80 check value.
- ``80 E4 00 00`` D2 version: DELETE a key set. 6985 the last one.
- ``80|00 E2 90 00`` elements 42 and 45: STORE DATA; ``80|00 CA`` tag: GET DATA (42, 45, 66, E0; class 00: the value alone).
- ``80 F2 80|40 02`` 4F: GET STATUS.

Optional commands of the draft that this card does not have answer 6D00: Method-FCT's other functions (6B00), OOB, Set-Multiple-Identity,
Add-/Delete-Identity (class 80 has ours), Get-AMSK, Enable-/Disable-PIN, and the ETSI form of Process-EAP (instruction 88).
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from secfunet.card.instructions import Cla, DomainIns, Ins, KeyIns

VERIFY_PIN_ALIAS: Final = 0x2A


class Guard(Enum):
    """Who may give a command."""

    NOBODY = "nobody"
    USER = "user"
    EITHER = "either"
    ADMINISTRATOR = "administrator"
    """Nobody's PIN: the secure channel."""


GUARDS: Final[dict[tuple[int, int], Guard]] = {
    (Cla.EAP, Ins.VERIFY_PIN): Guard.NOBODY,
    (Cla.EAP, VERIFY_PIN_ALIAS): Guard.NOBODY,
    (Cla.EAP, Ins.CHANGE_PIN): Guard.NOBODY,
    (Cla.EAP, Ins.UNBLOCK_PIN): Guard.ADMINISTRATOR,
    (Cla.EAP, Ins.SET_IDENTITY): Guard.USER,
    (Cla.EAP, Ins.GET_NEXT_IDENTITY): Guard.EITHER,
    (Cla.EAP, Ins.GET_CURRENT_IDENTITY): Guard.EITHER,
    (Cla.EAP, Ins.GET_PROFILE_DATA): Guard.EITHER,
    (Cla.EAP, Ins.STATE): Guard.USER,
    (Cla.EAP, Ins.PROCESS_EAP): Guard.USER,
    (Cla.EAP, Ins.METHOD_FUNCTION): Guard.USER,
    (Cla.EAP, Ins.GET_EXPORTED_PARAMETER): Guard.USER,
    (Cla.EAP, Ins.GET_SESSION_KEY): Guard.USER,
    (Cla.KEYS, KeyIns.OPERATE): Guard.USER,
    (Cla.KEYS, KeyIns.GET_CERTIFICATE): Guard.EITHER,
    (Cla.KEYS, KeyIns.GENERATE_KEY): Guard.ADMINISTRATOR,
    (Cla.KEYS, KeyIns.REQUEST_CERTIFICATE): Guard.ADMINISTRATOR,
    (Cla.KEYS, KeyIns.LOAD_IDENTITY): Guard.ADMINISTRATOR,
    (Cla.KEYS, KeyIns.DELETE_IDENTITY): Guard.ADMINISTRATOR,
    (Cla.KEYS, KeyIns.BIND_IDENTITY): Guard.ADMINISTRATOR,
    (Cla.KEYS, KeyIns.GET_BINDING): Guard.EITHER,
    (Cla.KEYS, KeyIns.SEAL): Guard.USER,
    (Cla.KEYS, KeyIns.TRUST_TOKEN_AUTHORITY): Guard.ADMINISTRATOR,
    (Cla.KEYS, KeyIns.GET_TOKEN_AUTHORITIES): Guard.EITHER,
    (Cla.KEYS, KeyIns.LOAD_TOKEN): Guard.USER,
    (Cla.KEYS, KeyIns.LIST_TOKENS): Guard.USER,
    (Cla.KEYS, KeyIns.GET_TOKEN): Guard.USER,
    (Cla.KEYS, KeyIns.DELETE_TOKEN): Guard.USER,
    (Cla.KEYS, DomainIns.INITIALIZE_UPDATE): Guard.NOBODY,
}
"""While the applet is selected."""

DOMAIN_GUARDS: Final[dict[tuple[int, int], Guard]] = {
    (Cla.KEYS, DomainIns.INITIALIZE_UPDATE): Guard.NOBODY,
    (Cla.ISO, DomainIns.GET_DATA): Guard.NOBODY,
    (Cla.KEYS, DomainIns.GET_DATA): Guard.NOBODY,
    (Cla.KEYS, DomainIns.PUT_KEY): Guard.ADMINISTRATOR,
    (Cla.ISO, DomainIns.STORE_DATA): Guard.ADMINISTRATOR,
    (Cla.KEYS, DomainIns.STORE_DATA): Guard.ADMINISTRATOR,
    (Cla.KEYS, DomainIns.GET_STATUS): Guard.ADMINISTRATOR,
    (Cla.KEYS, DomainIns.DELETE): Guard.ADMINISTRATOR,
}
"""While the security domain is selected."""

NAMES: Final[dict[tuple[int, int], str]] = {
    (Cla.ISO, Ins.SELECT): "select",
    (Cla.EAP, Ins.SELECT): "select",
    (Cla.EAP, Ins.GET_RESPONSE): "get-response",
    (Cla.EAP, Ins.FETCH): "fetch",
    (Cla.EAP, VERIFY_PIN_ALIAS): "verify-pin",
    **{(Cla.EAP, ins): ins.name.lower().replace("_", "-") for ins in Ins if (Cla.EAP, ins) in GUARDS},
    **{(Cla.KEYS, ins): ins.name.lower().replace("_", "-") for ins in DomainIns},
    # Where the two applications have the same number, the applet's command is the one that is given every day.
    **{(Cla.KEYS, ins): ins.name.lower().replace("_", "-") for ins in KeyIns},
}
"""What logs and metrics call a command."""
