import asyncio
import time

from arq import create_pool
from arq.connections import RedisSettings
from work import SLOTS, URL, awork

HERE = RedisSettings.from_dsn(URL)


async def noop(ctx, sent_ns: int) -> None: await awork(sent_ns)


class WorkerSettings:
    functions, redis_settings, max_jobs = [noop], HERE, SLOTS


async def many(n: int) -> None:
    pool = await create_pool(HERE)
    for k in range(0, n, 100):
        await asyncio.gather(*[pool.enqueue_job("noop", time.time_ns()) for _ in range(min(100, n - k))])
    await pool.aclose()


async def paced(n: int, gap_s: float) -> None:
    pool = await create_pool(HERE)
    for _ in range(n):
        await pool.enqueue_job("noop", time.time_ns())
        await asyncio.sleep(gap_s)
    await pool.aclose()
