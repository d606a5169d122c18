"""Checkpoints: the whole state of a run, in a folder or a bucket, so that it can go on as if nothing had happened.

The state is written under a new name, whole and flushed, and only then does the small pointer
`latest.json` name it. A run killed at any moment finds the pointer's last complete state.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bundle.remote import reason
from training.sources import open_address

POINTER = "latest.json"
_STATE = "state-{step:09d}.pt"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or continued; the message says where and why."""


@dataclass(frozen=True)
class Checkpoints:
    """Checkpoints of one run at `address`, a folder or gs://bucket/path.

    `run`: what makes it this run (settings, data, model), JSON-able: a state of another is refused.
    """

    address: str
    run: Mapping[str, Any]

    def prepare(self, needed: int) -> None:
        """Raises CheckpointError where two states of `needed` bytes find no room, before they are made."""
        if "://" in self.address:
            return
        try:
            Path(self.address).mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.address).free
        except OSError as exc:
            raise CheckpointError(f"{self.address}: no checkpoint can be written there ({exc.strerror})") from exc
        if free < 2 * needed:
            raise CheckpointError(
                f"{self.address}: {2 * needed / 1e6:,.0f} MB are needed for checkpoints, the old and the new one, "
                f"and {free / 1e6:,.0f} MB are free: make room, or name another place with --checkpoints"
            )

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write the state after `step` steps; afterwards, and only then, is the last one gone."""
        name = _STATE.format(step=step)
        pointer = {"state": name, "step": step, "run": _plain(self.run)}
        try:
            if "://" in self.address:
                self._upload(name, state, json.dumps(pointer).encode())
            else:
                self._write(name, state, json.dumps(pointer).encode())
        except Exception as exc:  # OSError, what torch makes of it, and what clouds raise: not a closed set
            raise CheckpointError(
                f"{self.address}: the checkpoint of step {step} was not written: {self._why(exc, writing=True)}"
            ) from exc

    def load(self) -> dict[str, Any] | None:
        """The last state, or None where there is none. Raises CheckpointError where it is of another run."""
        filesystem, root = open_address(self.address)
        try:
            pointer = json.loads(filesystem.cat_file(f"{root}/{POINTER}"))
        except FileNotFoundError:
            return None
        except Exception as exc:  # as in save
            raise CheckpointError(f"{self.address}/{POINTER}: cannot be read: {self._why(exc)}") from exc
        now = _plain(self.run)
        if other := [key for key in sorted({*now, *pointer["run"]}) if now.get(key) != pointer["run"].get(key)]:
            was, is_ = (str(run.get(other[0])) for run in (pointer["run"], now))
            more = f", and {len(other) - 1} more differ" if len(other) > 1 else ""
            raise CheckpointError(
                f"{self.address}: holds the checkpoint of another run: {other[0]} was {was}, now it is {is_}{more}. "
                "Start with what it was to go on, with --fresh to begin anew, or with another --checkpoints"
            )
        try:
            with filesystem.open(f"{root}/{pointer['state']}", "rb") as file:
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as exc:  # as in save
            raise CheckpointError(
                f"{self.address}/{pointer['state']}: cannot be read: {self._why(exc)}: begin anew with --fresh"
            ) from exc
        return state

    def clear(self) -> None:
        """Remove what is there of checkpoints, the pointer first."""
        filesystem, root = open_address(self.address)
        try:
            for path in (f"{root}/{POINTER}", *filesystem.glob(f"{root}/state-*")):
                if filesystem.exists(path):
                    filesystem.rm_file(path)
            if "://" not in self.address and os.path.isdir(root) and not os.listdir(root):
                os.rmdir(root)
        except Exception as exc:  # as in save
            raise CheckpointError(
                f"{self.address}: its checkpoints cannot be removed: {self._why(exc, writing=True)}"
            ) from exc

    def _write(self, name: str, state: Mapping[str, Any], pointer: bytes) -> None:
        folder = Path(self.address)
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in ((name, state), (POINTER, pointer)):
            new = folder / f"{file}.new"
            with new.open("wb") as stream:
                if isinstance(content, bytes):
                    stream.write(content)
                else:
                    torch.save(content, stream)
                stream.flush()
                os.fsync(stream.fileno())  # before the rename, or a power cut leaves a name without its bytes
            new.replace(folder / file)
        for old in folder.glob("state-*"):
            if old.name != name:
                old.unlink()

    def _upload(self, name: str, state: Mapping[str, Any], pointer: bytes) -> None:
        filesystem, root = open_address(self.address)
        with filesystem.open(f"{root}/{name}", "wb") as stream:  # an object appears when it is whole
            torch.save(state, stream)
        filesystem.pipe_file(f"{root}/{POINTER}", pointer)
        for old in filesystem.glob(f"{root}/state-*"):
            if not old.endswith("/" + name):
                filesystem.rm_file(old)

    def _why(self, exc: Exception, *, writing: bool = False) -> str:
        return reason(exc, writing=writing) if "://" in self.address else _why(exc)


def _plain(run: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(run)))
    return plain


def _why(exc: BaseException) -> str:
    """The reason, with what to do where the disk is full. torch wraps OSErrors: look through the chain."""
    chain: BaseException | None = exc
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f"no space is left ({os.strerror(chain.errno)}): make room and start again with the same command"
        chain = chain.__cause__ or chain.__context__
    return " ".join(str(exc).split())[:300] or type(exc).__name__
