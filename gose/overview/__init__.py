"""What ``gose status`` shows: who is enrolled, which cards answer, which tokens are out, what was revoked; and how a running grid is.

``picture`` takes it; ``text`` and ``machine`` say it to a person and to a program; ``pulse`` is what happened between two looks, and
``watch`` the short picture that is drawn again and again.
"""

from gose.overview.picture import CardReport, CardState, Overview, take_overview

__all__ = ["CardReport", "CardState", "Overview", "take_overview"]
