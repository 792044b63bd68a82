"""The one exception for a user's mistake."""


class InputError(ValueError):
    """Something that the user gave is wrong.

    The message is one sentence that names the file, field or value and says what
    would be right. The command line prints it without a traceback.
    """
