"""The one exception that a user can cause, and the exit codes of the commands."""

# The machine's fault: no permission, a full disk.
EXIT_FAILURE = 1
# The same code as argparse's.
EXIT_USER_ERROR = 2
# sysexits.h EX_TEMPFAIL: nothing is wrong, try again. Schedulers restart a run that ends with it.
EXIT_REQUEUE = 75
# Worth a restart too, but not without end.
EXIT_HUNG = 76
# 128 + SIGINT.
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Bad input: one clear line that names the setting, the value and what to do.

    Commands print it as `error: …` and exit with code 2; it never carries a traceback to the user.
    """


def first_line(error: BaseException) -> str:
    """An error's first line, without the page of advice that some libraries add; its type's name if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
