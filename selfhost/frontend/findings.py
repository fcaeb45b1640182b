"""What a diagnosis finds, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional


@dataclass(frozen=True)
class Step:
    """One step on the way to a card or a file; `problem` and `remedy` are empty where it went well."""

    subject: str  # "card", or the name of a file
    name: str  # "url", "name" (resolution), "connect", "tls", "answer" (its header) or "content"
    seconds: float
    detail: str
    problem: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class FileVerdict:
    """What came of one file from one source; `problem` is empty if it is what the card says."""

    name: str
    url: str
    checksum: str  # as the card has it
    size: Optional[int]  # the same; None: the card does not tell
    received: int  # bytes
    seconds: float
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found; `notices` tell what is worth knowing though it works."""

    steps: tuple[Step, ...]
    files: tuple[FileVerdict, ...]
    notices: tuple[str, ...]

    @property
    def is_ok(self) -> bool:
        """Whether a frontend here would have the model."""
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """Each cause of a failure once, the first one first."""
        return tuple(dict.fromkeys(step.problem for step in self.steps if step.problem))

    @property
    def summary(self) -> str:
        """The result in one line."""
        wrong = sum(bool(file.problem) for file in self.files)
        if wrong:
            return f"{wrong} of {len(self.files)} files are not to be had: {', '.join(self.problems)}"
        if self.problems:
            return f"the card is not to be had: {', '.join(self.problems)}"
        received = sum(file.received for file in self.files)
        seconds = sum(file.seconds for file in self.files)
        return f"all files ({len(self.files)}) are what they should be: {received} bytes in {seconds:.2f} s"
