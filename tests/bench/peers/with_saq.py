import asyncio
import time

from saq import Queue
from work import SLOTS, URL, awork

queue = Queue.from_url(URL)


async def noop(ctx, *, sent_ns: int) -> None: await awork(sent_ns)

settings = {"queue": queue, "functions": [noop], "concurrency": SLOTS}


async def many(n: int) -> None:
    for k in range(0, n, 100):
        await asyncio.gather(*[queue.enqueue("noop", sent_ns=time.time_ns()) for _ in range(min(100, n - k))])
    await queue.disconnect()


async def paced(n: int, gap_s: float) -> None:
    for _ in range(n):
        await queue.enqueue("noop", sent_ns=time.time_ns())
        await asyncio.sleep(gap_s)
    await queue.disconnect()
