"""How to reach a card: a port carries APDUs (``unix``, ``pcsc``; ``place`` chooses), a client speaks the card's commands above it, a pool
says whose turn it is.
"""

from secfunet.card.client import CardClient
from secfunet.card.errors import CardBusyError, CardError, CardFormatError, CardGoneError, LeaseEndedError
from secfunet.card.parameters import EapState, KeyAlgorithm, NegotiatedTls, Segmentation, TlsParameters
from secfunet.card.pool import CardPool, SingleCard
from secfunet.card.ports import CardPort
from secfunet.card.ready import CardOpener, PinWithheldError, ready_card, verify_carefully
from secfunet.card.unix import connect_unix

__all__ = [
    "CardBusyError",
    "CardClient",
    "CardError",
    "CardFormatError",
    "CardGoneError",
    "CardOpener",
    "CardPool",
    "CardPort",
    "EapState",
    "KeyAlgorithm",
    "LeaseEndedError",
    "NegotiatedTls",
    "PinWithheldError",
    "Segmentation",
    "SingleCard",
    "TlsParameters",
    "connect_unix",
    "ready_card",
    "verify_carefully",
]
