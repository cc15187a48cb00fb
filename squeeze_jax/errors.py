"""What can go wrong that is not our code's fault; commands print the message alone."""


class InputError(ValueError):
    """The user's input cannot be used. The message is one sentence (or one a bad row) that names
    the thing, the value found and the way out; commands print it without a traceback and exit with
    code 2.
    """


class OutputError(RuntimeError):
    """A result could not be written. One sentence, as above; exit code 1."""


class Preempted(Exception):  # noqa: N818
    """The machine is being taken away (SIGTERM) and the run's state is saved; exit code 143, as
    the shell has it."""
