"""``python -m cagsr.serving.training_process FOLDER SERVER``: the process that a server starts for a training.

It ends when the server, the process of that number, has ended, however that was: nobody would pace it, or take what it makes.
That is looked after before anything is imported that takes its time.
"""

import os
import signal
import sys
import threading
import time

LOOKS = 0.5
"""Seconds between looks whether the server is still there."""


def leave_with(server: int) -> None:
    """End this process once its parent is no longer the server."""

    def look() -> None:
        while os.getppid() == server:
            time.sleep(LOOKS)
        os._exit(1)

    threading.Thread(target=look, name="cagsr-leaves", daemon=True).start()


def heed_interrupts() -> None:
    """SIGINT, by which the server says that the time is up, is heard: what a shell starts in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    leave_with(int(sys.argv[2]))
    heed_interrupts()
    from cagsr.serving.work import begin

    sys.exit(begin(sys.argv[1]))
