"""A VM's definition as a file, to be carried from one host's daemon to another's: one JSON object, its certificate as PEM."""

from __future__ import annotations

import json

from secfunet.errors import SecFuNetError
from secfunet.identity import IdentityError, der_of, load_certificate, pem_of
from secfunet.middleware.v1 import orchestrator_pb2 as pb

MAX_DEFINITION = 32768  # bytes
_TEXTS = ("uuid", "name", "address")
_NUMBERS = ("memory_mib", "vcpus")
_CERTIFICATE = "vm_certificate"


class DefinitionError(SecFuNetError):
    """This is no VM's definition."""


def definition_to_json(definition: pb.VmDefinition) -> str:
    """ASCII, with a final newline. Nothing in it is secret."""
    fields = {name: getattr(definition, name) for name in (*_TEXTS, *_NUMBERS)}
    fields[_CERTIFICATE] = pem_of(definition.vm_certificate).decode("ascii")
    return json.dumps(fields, indent=2) + "\n"


def definition_from_json(untrusted: bytes) -> pb.VmDefinition:
    """The form alone is checked; the daemon checks the rest. Raises DefinitionError, and nothing else."""
    if len(untrusted) > MAX_DEFINITION:
        raise DefinitionError(f"it is larger than {MAX_DEFINITION} bytes")
    try:
        fields = json.loads(untrusted)
    except (ValueError, RecursionError):
        raise DefinitionError("it is no JSON") from None
    if not isinstance(fields, dict) or fields.keys() != {*_TEXTS, *_NUMBERS, _CERTIFICATE}:
        raise DefinitionError("it is not what 'secure-middleware vm export' writes")
    if not all(isinstance(fields[name], str) and fields[name].isascii() for name in (*_TEXTS, _CERTIFICATE)):
        raise DefinitionError("a member that should be a text is none")
    if not all(type(fields[name]) is int and 0 <= fields[name] < 1 << 32 for name in _NUMBERS):
        raise DefinitionError("a member that should be a number is none")
    try:
        fields[_CERTIFICATE] = der_of(load_certificate(fields[_CERTIFICATE].encode("ascii")))
    except IdentityError as error:
        raise DefinitionError(f"its certificate cannot be read: {error}") from None
    return pb.VmDefinition(**fields)
