import time

from celery import Celery
from work import URL, work

app = Celery("bench", broker=URL, backend=URL)
app.conf.task_acks_late = True


@app.task(name="noop")
def noop(sent_ns: int) -> None: work(sent_ns)


def many(n: int) -> None:
    for _ in range(n): noop.delay(time.time_ns())


def paced(n: int, gap_s: float) -> None:
    for _ in range(n):
        noop.delay(time.time_ns())
        time.sleep(gap_s)
