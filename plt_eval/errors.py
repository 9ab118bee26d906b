"""Errors that a user caused and can mend: one line each, exit code 2, never a traceback."""


def one_line(said: object, limit: int | None = 300) -> str:
    """Text, or what an error says, without line breaks and cut, as a part of another message. An error that says
    nothing is told by its type."""
    text = " ".join(str(said).split())[:limit]
    return text or (type(said).__name__ if isinstance(said, BaseException) else "")


class UserError(ValueError):
    """A mistake in what the user gave: the message names the flag, file or record, what was found and
    what was expected, on one line."""


class MissingExtra(UserError):
    """An optional part is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, why: str) -> None:
        super().__init__(f"{why} needs {package}, which is not installed: pip install 'plt-eval[{extra}]'")
