"""`python -m ddt_fast` names the commands."""

import sys

from ddt_fast.command import fail

COMMANDS = ("train", "sample", "evaluate", "convert", "cache_latents", "sharing", "demo")

if __name__ == "__main__":
    given = f"{sys.argv[1]!r} is no command of its own" if len(sys.argv) > 1 else "no command"
    fail(f"{given}; wanted python -m ddt_fast.COMMAND, one of {', '.join(COMMANDS)}; each has --help")
