"""How the story is told: colours and weight on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.markup import escape


@dataclass
class Narrator:
    """Chapters, steps with the time since the beginning, and facts under a step."""

    console: Console
    began: float = field(default_factory=time.monotonic)

    @classmethod
    def for_stream(cls, stream: TextIO) -> Narrator:
        return cls(Console(file=stream, highlight=False, soft_wrap=True, emoji=False))

    def chapter(self, title: str) -> None:
        self.console.print(f"\n[bold]{escape(title)}[/bold]")

    def step(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self.began:6.1f} s[/dim]  {escape(text)}")

    def fact(self, text: str) -> None:
        self.console.print(f"          [dim]{escape(text)}[/dim]")

    def good(self, text: str) -> None:
        self.console.print(f"[green]      ok[/green]  {escape(text)}")

    def say(self, text: str = "") -> None:
        self.console.print(escape(text))
