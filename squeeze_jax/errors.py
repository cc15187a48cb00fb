"""What a user's input can do wrong, as opposed to what our code can."""


class InputError(ValueError):
    """The user's input cannot be used. The message is one sentence (or one a bad row) that names the thing, the value
    found and the way out; commands print it without a traceback and exit with code 2.
    """
