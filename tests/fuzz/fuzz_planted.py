"""Targets with faults of every kind, which the campaign must find."""

import os
import random
import signal
import time
from pathlib import Path

from fuzz_campaign import CANARY, SilentError, Target


class Planted(Target):
    refusals = (ValueError,)

    def build(self, home: Path) -> None:
        self.canary = home.parent / CANARY

    def mutate(self, chance: random.Random, folder: Path) -> None:
        (folder / "input").write_text(str(chance.randrange(1000)))


class Sound(Planted):
    name = "sound"

    def read(self, folder: Path) -> None:
        if int((folder / "input").read_text()) % 2:
            raise ValueError("an odd number")


class Traceback(Planted):
    name = "traceback"

    def read(self, folder: Path) -> None:
        if int((folder / "input").read_text()) % 3 == 0:
            raise KeyError("lost")


class Wordy(Planted):
    name = "wordy"

    def read(self, folder: Path) -> None:
        raise ValueError("two\nlines")


class Hang(Planted):
    name = "hang"

    def read(self, folder: Path) -> None:
        if int((folder / "input").read_text()) % 10 == 0:
            time.sleep(3600)


class Crash(Planted):
    name = "crash"

    def read(self, folder: Path) -> None:
        if int((folder / "input").read_text()) % 10 == 0:
            os.kill(os.getpid(), signal.SIGSEGV)


class Execution(Planted):
    name = "execution"

    def read(self, folder: Path) -> None:
        self.canary.touch()


class Silent(Planted):
    name = "silent"

    def read(self, folder: Path) -> None:
        raise SilentError("taken for right")


class Broken(Planted):
    name = "broken"

    def build(self, home: Path) -> None:
        raise RuntimeError("no original")


TARGETS = {
    target.name: target for target in (Sound, Traceback, Wordy, Hang, Crash, Execution, Silent, Broken)
}
