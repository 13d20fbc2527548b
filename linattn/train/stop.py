"""The only place that knows how a run is asked to stop: by a signal, by a file, or by the end of its launcher."""

import signal
import threading
from pathlib import Path

from .world import World

FILE = "STOP"  # in the folder of the run: for whoever may write there but cannot reach the process


class Stop:
    """`with Stop() as stop: ...` - `stop.signal` is None until SIGINT or SIGTERM comes, then that signal; a second Ctrl-C stops at once.

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

    def agreed(self, world: World, out: Path) -> signal.Signals | None:
        """What any process of `world` was asked by, the same answer in all of them: launchers signal one process before the others."""
        asked = self.signal or 0
        if not asked and (world.orphaned or (world.first and (out / FILE).exists())):
            asked = signal.SIGTERM
        number = world.largest(int(asked))
        return signal.Signals(number) if number else None

    def _note(self, number, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
