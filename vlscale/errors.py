"""The one exception that the command line turns into a single line and exit code 2."""


class UserError(Exception):
    """Bad input: names the file, the field, what was expected and how to fix it, in one line."""
