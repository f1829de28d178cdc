"""The exceptions that the command line turns into a single line."""


class UserError(Exception):
    """Bad input: names the file, the field, what was expected and how to fix it, in one line. Exit code 2."""


class RunBroken(Exception):
    """Something from outside ended the run, such as another rank that is gone; in one line. Exit code 1."""
