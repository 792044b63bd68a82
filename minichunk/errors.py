"""The one exception for a user's mistake."""


class InputError(ValueError):
    """Its message names the file, field or value that is wrong, and says what would be right. The command line prints
    it without a traceback."""
