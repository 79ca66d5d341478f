"""A process of ours on a wall clock that can be set while it runs: `python skewed.py FILE worker --name w1`; FILE holds seconds.

Everything that Python code can ask for the wall clock is shifted; the monotonic clock stays true, as on a real machine. (Servers
get their clock from libfaketime instead, which costs an interpreter with its hundreds of thousands of looks too much.)
"""
import datetime
import sys
import time
from pathlib import Path

stamp, real = Path(sys.argv[1]), time.time
shift = dict(seconds=0.0, read=-1.0)


def seconds() -> float:
    if time.monotonic() - shift["read"] > 0.05: shift.update(seconds=float(stamp.read_text()), read=time.monotonic())
    return shift["seconds"]


class Datetime(datetime.datetime):
    @classmethod
    def now(cls, tz=None): return datetime.datetime.fromtimestamp(time.time(), tz)
    @classmethod
    def utcnow(cls): return datetime.datetime.fromtimestamp(time.time(), datetime.UTC).replace(tzinfo=None)


if __name__ == "__main__":
    sys.argv = ["myspinbot", *sys.argv[2:]]
    time.time = lambda: real() + seconds()
    time.time_ns = lambda: int(time.time() * 1e9)
    import myspinbot.cli.app
    import myspinbot.executor.engine
    import myspinbot.jobs.local  # what imported `datetime` by name
    for module in (myspinbot.executor.engine, myspinbot.jobs.local): module.datetime = Datetime
    myspinbot.cli.app.main()
