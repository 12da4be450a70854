"""Whether anybody is being answered: what idle time is."""

import threading
import time
from dataclasses import dataclass, field


@dataclass
class Activity:
    """How many requests are being answered, and since when none is."""

    active: int = 0
    last: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> None:
        with self.lock:
            self.active += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.active, self.last = self.active - 1, time.monotonic()

    def idle(self) -> float:
        """Seconds without a request; 0 while there is one."""
        with self.lock:
            return 0.0 if self.active else time.monotonic() - self.last
