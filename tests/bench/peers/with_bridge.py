"""Our bridge in the shape of its peers. The worker is the loop of `myspinbot.worker` without the journal: one thread reads for
the free slots, the slots do the job and finish it with a hint. `python with_bridge.py` runs it until it is terminated."""
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore

from work import SLOTS, URL, work

from myspinbot.bridge import Bridge, Entry
from myspinbot.schema import StepMessage


def message() -> StepMessage: return StepMessage(job="job_bench", key=str(time.time_ns()))


def many(n: int) -> None:
    with Bridge(URL) as bridge: bridge.publish_many(("cpu", "normal", message()) for _ in range(n))


def paced(n: int, gap_s: float) -> None:
    with Bridge(URL) as bridge:
        for _ in range(n):
            bridge.publish("cpu", "normal", message())
            time.sleep(gap_s)


def worker() -> None:
    with Bridge(URL) as bridge, ThreadPoolExecutor(SLOTS) as slots:
        free = Semaphore(SLOTS)

        def handle(entry: Entry) -> None:
            work(int(entry.message.key))
            bridge.finish(entry, {"job": entry.message.job, "key": entry.message.key})
            free.release()

        while True:
            free.acquire()
            count = 1
            while count < SLOTS and free.acquire(blocking=False): count += 1
            entries = bridge.read(["cpu"], "bench:0", count)
            for entry in entries: slots.submit(handle, entry)
            free.release(count - len(entries)) if len(entries) < count else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    worker()
