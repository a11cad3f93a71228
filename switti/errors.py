"""The one exception that a user can cause."""


class UserError(Exception):
    """Bad input: one clear line that names the setting, the value and what to do.

    Commands print it as `error: …` and exit with code 2; it never carries a traceback to the user.
    """
