"""What every command shares: how an error ends it. One line on stderr, a meaningful exit code, no traceback."""

import os
import sys
from collections.abc import Callable

from switti.errors import UserError

EXIT_FAILURE = 1  # the machine's fault: no permission, a full disk
EXIT_USER_ERROR = 2  # the same code as argparse's
EXIT_INTERRUPTED = 130  # 128 + SIGINT


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call `main` with the command line's arguments and exit with its code (None: 0)."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        code = _report(str(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        code = _report("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone; point stdout elsewhere so that Python's own flush at exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILURE
    except OSError as error:
        code = _report(str(error), EXIT_FAILURE)
    sys.exit(code)


def split_prompts(words: list[str]) -> tuple[list[str], list[str]]:
    """(prompts, settings) of a command line that mixes them: a setting has an = and no space."""
    settings = [word for word in words if "=" in word and " " not in word]
    return [word for word in words if word not in settings], settings


def _report(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code
