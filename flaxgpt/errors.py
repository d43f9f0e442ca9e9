"""The one exception type for input that a person can mend."""


class InputError(ValueError):
    """A value, file or flag from outside is unusable; the message says what was wrong and what to do.

    The library raises it like any ValueError; the scripts print its one line and exit with code 2
    (`flaxgpt.run.cli`). Any other exception is a bug of ours and keeps its traceback.
    """
