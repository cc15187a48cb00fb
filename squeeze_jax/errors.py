"""What can go wrong that is not our code's fault; commands print the message alone."""

LONGEST = 1_000
"""Characters of a line that are shown (our decision): a spoilt file may hold a flood."""
CONTROL = {code: f"\\x{code:02x}" for code in [*range(32), 127] if chr(code) not in "\n\t"}


def printable(text: str) -> str:
    """A message as a terminal can show it: control characters and what is no Unicode are spelled
    out, a line of more than `LONGEST` characters loses its middle."""
    text = text.encode(errors="backslashreplace").decode().translate(CONTROL)
    return "\n".join(
        line if len(line) <= LONGEST else f"{line[:600]} … {line[-300:]}"
        for line in text.split("\n")
    )


class InputError(ValueError):
    """The user's input cannot be used. The message is one sentence (or one a bad row) that names
    the thing, the value found and the way out; commands print it without a traceback and exit with
    code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class OutputError(RuntimeError):
    """A result could not be written. One sentence, as above; exit code 1."""


class Preempted(Exception):  # noqa: N818
    """The machine is being taken away (SIGTERM) and the run's state is saved; exit code 143, as
    the shell has it."""


def exit_code(error: BaseException) -> int:
    """With which a command ends that raised it."""
    codes = {InputError: 2, OutputError: 1, Preempted: 143, KeyboardInterrupt: 130}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; of a long one the beginning and the end, where the cause
    stands."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:60]} … {line[-130:]}"
