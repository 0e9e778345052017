"""The cards of tests/tandem, made anew for this room."""

from __future__ import annotations

from tests.tandem.conftest import cards, files, pools

__all__ = ["cards", "files", "pools"]
