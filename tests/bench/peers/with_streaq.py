import asyncio
import time

from streaq import Worker
from work import SLOTS, URL, awork

worker = Worker(redis_url=URL, concurrency=SLOTS)


@worker.task()
async def noop(sent_ns: int) -> None: await awork(sent_ns)


async def many(n: int) -> None:
    async with worker: await worker.enqueue_many([noop.enqueue(time.time_ns()) for _ in range(n)])


async def paced(n: int, gap_s: float) -> None:
    async with worker:
        for _ in range(n):
            await noop.enqueue(time.time_ns())
            await asyncio.sleep(gap_s)
