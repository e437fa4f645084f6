"""`python -m ddt_fast` lists the commands."""

import sys
from typing import NoReturn

from ddt_fast.command import fail

COMMANDS = ("train", "sample", "evaluate", "convert", "cache_latents", "sharing", "tune_sampler", "demo")


def main() -> NoReturn:
    """End with the commands to run instead."""
    given = f"{sys.argv[1]!r} is not a command" if len(sys.argv) > 1 else "no command"
    fail(f"{given}; expected python -m ddt_fast.COMMAND, one of {', '.join(COMMANDS)}; each has --help")


if __name__ == "__main__":
    main()
