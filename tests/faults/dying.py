"""Run the command in this process and die by SIGKILL at the N-th call of a system call wrapper.

python dying.py {replace|fsync|unlink|pwrite|write|…} N {before|after} ARGUMENTS…
python dying.py count NAME 0 before ARGUMENTS…      prints how many calls a whole run makes
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from pissa_convert.cli import main


def install(name: str, fatal: int, when: str) -> list[int]:
    calls = [0]
    original = getattr(os, name)

    def dying(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == fatal and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        number = calls[0]
        try:
            return original(*arguments, **options)
        finally:
            if number == fatal and when == "after":
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, name, dying)
    return calls


if __name__ == "__main__":
    mode, name, when, *arguments = sys.argv[1:]
    if mode == "count":
        calls = install(name, -1, when)
        code = main(arguments)
        print(calls[0])
        sys.exit(code)
    install(mode, int(name), when)
    sys.exit(main(arguments))
