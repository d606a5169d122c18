"""How far a run is: a bar on a terminal, plain lines in a log, scalars for TensorBoard."""

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bundle.remote import reason
from training.sources import open_address

EVERY_S = 30.0  # between plain lines, and between uploads of scalars


class Progress:
    """`total` steps of `unit`s, from `start` on. Use it in a `with`; no bar or lines where `quiet`."""

    def __init__(
        self, name: str, total: int, unit: str = "images", start: int = 0, scalars: str = "", quiet: bool = False
    ) -> None:
        self.name, self.total, self.unit, self.quiet = name, total, unit, quiet
        self.done, self.units, self.seconds = start, 0, 0.0
        self._start, self._began, self._line = start, time.monotonic(), 0.0
        self._bar: Any = None
        if sys.stderr.isatty() and not quiet:
            self._bar = tqdm(total=total, initial=start, desc=name, unit="step", dynamic_ncols=True)
        self._writer: Any = None
        # TensorBoard's own way into a bucket would overwrite its file with every line: objects cannot grow.
        self._bucket, self._due = scalars if "://" in scalars else "", time.monotonic() + EVERY_S
        self._folder = tempfile.mkdtemp(prefix="scalars-") if self._bucket else scalars
        if scalars:
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            # What a killed run wrote after its last checkpoint is hidden: the steps come again.
            self._writer = SummaryWriter(self._folder, purge_step=start)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        if self._bucket:
            self._send()
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def rate(self) -> float:
        """Units a second since the start."""
        return self.units / max(1e-9, time.monotonic() - self._began)

    def step(self, units: int, text: str = "") -> None:
        """One more step, of so many units."""
        self.done += 1
        self.units += units
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self.rate:.1f} {self.unit}/s {text}", refresh=False)
            self._bar.update()
        elif not self.quiet:
            now = time.monotonic()
            if now - self._line >= EVERY_S or self.done == self.total:
                self._line = now
                left = (now - self._began) / (self.done - self._start) * (self.total - self.done)
                self.say(f"{self.done}/{self.total}, {self.rate:.1f} {self.unit}/s, {_time(left)} left {text}".strip())

    def scalar(self, name: str, value: float, step: int) -> None:
        if self._writer is not None:
            self._writer.add_scalar(name, value, step)
            if self._bucket and time.monotonic() >= self._due:
                self._writer.flush()
                self._send()

    def _send(self) -> None:
        """The scalars so far to the bucket. One that fails is said, costs little, and ends no run."""
        began = time.monotonic()
        try:
            filesystem, root = open_address(self._bucket)
            for file in Path(self._folder).iterdir():
                filesystem.put_file(str(file), f"{root}/{file.name}")
        except Exception as exc:  # gcsfs, aiohttp and google-auth raise their own, without a common base
            print(f"{self.name}: {self._bucket}: the scalars: {reason(exc, writing=True)}", file=sys.stderr)
        now = time.monotonic()
        self._due = now + max(EVERY_S, 20 * (now - began))

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self.quiet:
            tqdm.write(f"{self.name}: {text}", file=sys.stderr)


def _time(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
