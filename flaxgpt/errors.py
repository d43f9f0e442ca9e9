"""The one exception type for input that a person can mend."""


class InputError(ValueError):
    """A value, file or flag from outside is unusable; the message says what was wrong and what to do.

    The library raises it like any ValueError; the scripts exit with code 2 and its message, in one line (`flaxgpt.run.cli`) or,
    where flags do not make a valid config, in tyro's frame. Any other exception is a bug of ours and keeps its traceback.
    """
