"""The head of every command: its argument parser, and errors as one line on stderr with an exit code."""

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress

from switti import arguments
from switti.allocator import keep_freed_memory
from switti.environment import masked
from switti.errors import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from switti.escape import printable

_SETTING = re.compile(r"[A-Za-z_][\w.]*=\S*")
# Characters of an error.
_LONGEST_LINE = 1000


def argument_parser(doc: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose usage is the first paragraph of a command's docstring, and whose description is the rest."""
    usage, _, description = (doc or "").strip().partition("\n\n")
    return argparse.ArgumentParser(
        prog=" ".join(usage.split()[:3]),
        usage=usage.replace("%", "%%").replace("\n", "\n       "),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def run(main: Callable[[list[str]], int | None]) -> None:
    """Call `main` with the command line's arguments and exit with its code (None: 0)."""
    keep_freed_memory()
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except UserError as error:
        code = _report(str(error), EXIT_USER_ERROR)
    # argparse has printed its error.
    except SystemExit as leaving:
        # An ArgumentError concerns the value of an option that exists.
        unknown = leaving.code == EXIT_USER_ERROR and not isinstance(
            leaving.__context__, argparse.ArgumentError
        )
        if unknown and (hint := _setting_with_dashes(sys.argv[1:])):
            print(hint, file=sys.stderr)
        raise
    except KeyboardInterrupt:
        code = _report("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader (`| head`) has gone; point stdout elsewhere so that Python's own flush at exit stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILURE
    except OSError as error:
        code = _report(str(error), EXIT_FAILURE)
    sys.exit(code)


def parse_with_prompts(
    form: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(options, prompts, settings) of a command line whose positional `prompts` mixes the last two.

    A word is a setting if it is name=value without blanks; all words after `--` are prompts. Raises UserError for
    unknown settings and for prompts that are not text.
    """
    mark = argv.index("--") if "--" in argv else len(argv)
    options = form.parse_intermixed_args(argv[:mark])
    settings = [word for word in options.prompts if _SETTING.fullmatch(word)]
    prompts = [word for word in options.prompts if word not in settings] + argv[mark + 1 :]
    if settings:
        _check_names(settings)
    return options, [arguments.text("prompt", prompt) for prompt in prompts], settings


def _check_names(settings: list[str]) -> None:
    from configs.loading import SETTINGS
    from switti.sampling.config import FOREIGN
    from switti.suggestions import did_you_mean

    for setting in settings:
        name = setting.partition("=")[0]
        if name not in SETTINGS and f"sampling.{name}" not in SETTINGS:
            known = [item.removeprefix("sampling.") for item in SETTINGS if item.startswith("sampling.")]
            hint = did_you_mean(name, known, FOREIGN)
            raise UserError(
                f"unknown setting {name!r}{hint}; a prompt of this form goes after --: -- {setting!r}"
            )


def _setting_with_dashes(words: list[str]) -> str:
    """A hint if a setting is written as an option (--key=value), otherwise ""."""
    from configs.foreign_names import FOREIGN
    from configs.loading import SETTINGS
    from switti.suggestions import did_you_mean

    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in SETTINGS:
            return f"settings are key=value without dashes: {name}={value or '…'}"
        if word.startswith("--") and (meant := did_you_mean(name, SETTINGS, FOREIGN)):
            return f"settings are key=value without dashes{meant}"
    return ""


def _report(message: str, code: int) -> int:
    # stderr itself may be the file that cannot be written.
    with suppress(OSError):
        lines = [_cut(printable(line)) for line in masked(message).splitlines()]
        print("error: " + "\n".join(lines), file=sys.stderr)
    return code


def _cut(line: str) -> str:
    """A line of readable length: the middle of an endless value is omitted."""
    return (
        line
        if len(line) <= _LONGEST_LINE
        else f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"
    )
