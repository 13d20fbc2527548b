"""The only place that touches signals: the first one asks for a clean stop, a second Ctrl-C stops at once."""

import signal
import threading


class Stop:
    """`with Stop() as stop: ...` - `stop.signal` is None until SIGINT or SIGTERM comes, then that signal.

    Outside the main thread Python allows no handlers; then nothing is changed and `signal` stays None.
    """

    HANDLED = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.HANDLED}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
