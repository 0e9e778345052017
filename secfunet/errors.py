"""The root of every error that this distribution raises on purpose."""


class SecFuNetError(Exception):
    """Something that a caller can understand and act on; its text is a sentence for a person.

    Each room derives one root of its own from it, and errors with their facts as attributes from that.
    """
