"""Time, threads and asyncio for the simulation: one real thread, a virtual clock, and a seed that decides who goes next.

Each thread, task and coroutine of the product runs as a greenlet ("fiber"). It runs until it waits (for time, a lock,
a future, or a server), so a run of the whole installation is a sequence of such slices, and the sequence follows from
the seed alone. Modules of the product get the stand-ins below in place of `threading`, `time` and `asyncio`; nothing
in them knows of it.
"""
import random
from collections.abc import Callable, Coroutine, Generator, Iterable
from heapq import heappop, heappush
from typing import Any

from greenlet import getcurrent, greenlet


class Killed(BaseException):
    "The process of this fiber is gone; raised wherever a fiber waits, so that nothing of it goes on."


class CancelledError(BaseException):
    "asyncio's, for fibers."


class Process:
    "What is killed, frozen and cut off as one."
    def __init__(self, name: str):
        self.name, self.dead, self.frozen_until, self.rate, self.shift = name, False, 0.0, 1.0, 0.0
        self.fibers: dict[Fiber, None] = {}
        self.troubles: list[tuple[float, str]] = []  # what the nemesis and the network did to it


class Fiber(greenlet):
    "A greenlet of a process."
    def __init__(self, world: "World", process: Process, fn: Callable[[], Any]):
        super().__init__(self.body, world.hub)
        self.world, self.process, self.fn, self.token = world, process, fn, 0
        self.cancelled = self.ended = False
        self.deadline: float | None = None     # of the innermost asyncio.timeout
        self.error: BaseException | None = None
        self.joined: list[Fiber] = []
        process.fibers[self] = None

    def body(self) -> None:
        try: self.fn()
        except Killed: pass
        except BaseException as e:
            self.error = e
            if not self.process.dead: self.world.crashed(self, e)
        finally:
            self.ended = True
            self.process.fibers.pop(self, None)
            for f in self.joined: self.world.wake(f)


def stretched(seconds: float) -> float:
    "The product's two pauses of 0.1 s and 0.2 s only look at a stop flag; longer ones halve the work and change nothing else."
    return 1.0 if seconds in (0.1, 0.2) else seconds


class World:
    "The scheduler."
    def __init__(self, seed: int):
        self.now, self.random, self.count = 0.0, random.Random(seed), 0
        self.chance = self.random.random
        self.heap: list[tuple[float, float, int, int, Fiber]] = []
        self.hub = getcurrent()
        self.errors: list[tuple[str, BaseException]] = []

    def spawn(self, process: Process, fn: Callable[[], Any], delay: float = 0.0) -> Fiber:
        "Run `fn` as a fiber of a process."
        f = Fiber(self, process, fn)
        self.wake(f, delay)
        return f

    def wake(self, f: Fiber, delay: float = 0.0) -> None:
        "Let a fiber go on; what it waited for else is void."
        f.token += 1
        self.count += 1
        heappush(self.heap, (self.now + delay, self.chance(), self.count, f.token, f))

    def park(self, delay: float | None = None) -> None:
        "Wait so long, or until woken."
        f = getcurrent()
        if f.process.dead: raise Killed
        if f.cancelled: self.deliver(f)
        if f.deadline is not None: delay = min(f.deadline - self.now, 1e9 if delay is None else delay)
        f.token += 1
        if delay is not None:
            self.count += 1
            heappush(self.heap, (self.now + delay, self.chance(), self.count, f.token, f))
        self.hub.switch()
        if f.process.dead: raise Killed
        if f.cancelled: self.deliver(f)

    def deliver(self, f: Fiber) -> None:
        f.cancelled = False
        raise CancelledError

    def run(self, until: float, done: Callable[[], bool]) -> None:
        "Run slices until this time, or until `done`, asked after each."
        heap = self.heap
        while heap and not done():
            at, _, _, token, f = heappop(heap)
            if f.token != token or f.ended: continue
            if at > until: return
            p = f.process
            if p.frozen_until > at and not p.dead:
                self.wake(f, p.frozen_until - self.now + self.random.random() * 0.05)
                continue
            self.now = max(self.now, at)
            f.switch()

    def kill(self, p: Process) -> None:
        "SIGKILL: its fibers never touch anything again."
        p.dead = True
        for f in list(p.fibers):
            if f is getcurrent(): continue
            f.parent = getcurrent()
            if f: f.throw(Killed)
            f.ended = True
        p.fibers.clear()
        if getcurrent() is not self.hub and getcurrent().process is p: raise Killed

    def crashed(self, f: Fiber, e: BaseException) -> None:
        "An exception that a thread or task of the product did not catch."
        self.errors.append((f.process.name, e))

    def sleep(self, seconds: float) -> None: self.park(stretched(max(0.0, seconds)) * getcurrent().process.rate)


# --- threading, time, concurrent.futures

class Condition:
    "threading.Condition; as nothing preempts a fiber, the lock itself has nothing to do."
    def __init__(self, world: World): self.world, self.waiting = world, []
    def __enter__(self) -> "Condition": return self
    def __exit__(self, *_: Any) -> None: pass
    def notify_all(self) -> None:
        for f in self.waiting: self.world.wake(f)
        self.waiting = []

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        f, w = getcurrent(), self.world
        if answer := predicate(): return answer
        end = None if timeout is None else w.now + stretched(timeout) * f.process.rate
        while end is None or w.now < end:
            self.waiting.append(f)
            try: w.park(None if end is None else end - w.now)
            finally:
                if f in self.waiting: self.waiting.remove(f)
            if answer := predicate(): return answer
        return answer


class Event:
    "threading.Event."
    def __init__(self, world: World): self.flag, self.condition = False, Condition(world)
    def is_set(self) -> bool: return self.flag
    def set(self) -> None:
        self.flag = True
        self.condition.notify_all()
    def wait(self, timeout: float | None = None) -> bool: return self.flag or bool(self.condition.wait_for(self.is_set, timeout))


class Thread:
    "threading.Thread."
    def __init__(self, world: World, target: Callable, args: tuple = (), name: str = "", daemon: bool = True):
        self.world, self.call, self.fiber = world, lambda: target(*args), None
    def start(self) -> None: self.fiber = self.world.spawn(getcurrent().process, self.call, 1e-6)
    def join(self, timeout: float | None = None) -> None: join(self.world, [self.fiber], timeout)


def join(world: World, fibers: Iterable[Fiber], timeout: float | None = None) -> None:
    "Wait for the ends of fibers."
    end = None if timeout is None else world.now + timeout
    for f in fibers:
        while not f.ended and (end is None or world.now < end):
            f.joined.append(getcurrent())
            world.park(None if end is None else end - world.now)


class Pool:
    "ThreadPoolExecutor; the worker never gives it more than it has threads for."
    def __init__(self, world: World, size: int, thread_name_prefix: str = ""): self.world, self.fibers = world, []

    def submit(self, fn: Callable, *args: Any) -> None:
        self.fibers.append(self.world.spawn(getcurrent().process, lambda: fn(*args), 1e-6))
    def shutdown(self, wait: bool = True) -> None: join(self.world, self.fibers)


class Threading:
    "The names that the product takes from `threading`."
    def __init__(self, world: World):
        self.Condition, self.Event = (lambda: Condition(world)), (lambda: Event(world))
        self.Thread = lambda target, args=(), name="", daemon=True: Thread(world, target, args, name)


class Time:
    "The names that the product takes from `time`; the clock of a process may be wrong."
    def __init__(self, world: World, server: bool = False): self.world, self.server, self.sleep = world, server, world.sleep
    def monotonic(self) -> float: return self.world.now if self.server else self.world.now / getcurrent().process.rate
    def time(self) -> float: return 1.9e9 + self.world.now + (0.0 if self.server else getcurrent().process.shift)
    def time_ns(self) -> int: return int(self.time() * 1e9)


# --- asyncio

class Future:
    "asyncio.Future."
    def __init__(self, world: World): self.world, self.waiting, self.state, self.value, self.callbacks = world, [], "", None, []
    def done(self) -> bool: return self.state != ""
    def cancelled(self) -> bool: return self.state == "cancelled"
    def exception(self) -> BaseException | None: return self.value if self.state == "error" else None

    def end(self, state: str, value: Any) -> None:
        if self.state: return
        self.state, self.value = state, value
        for f in self.waiting: self.world.wake(f)
        for fn in self.callbacks: fn(self)

    def set_result(self, value: Any) -> None: self.end("result", value)
    def set_exception(self, e: BaseException) -> None: self.end("error", e)

    def result(self) -> Any:
        if self.state == "result": return self.value
        raise CancelledError if self.state == "cancelled" else self.value

    def add_done_callback(self, fn: Callable) -> None: self.callbacks.append(fn)

    def wait(self) -> None:
        f, w = getcurrent(), self.world
        while not self.state:
            self.waiting.append(f)
            try: w.park()
            finally: self.waiting.remove(f)
            if f.deadline is not None and w.now >= f.deadline and not self.state: raise TimeoutError

    def __await__(self) -> Generator:
        self.wait()
        return self.result()
        yield


class Task(Future):
    "asyncio.Task: a coroutine in a fiber of its own; all its awaits are waits of the fiber."
    def __init__(self, world: World, coro: Coroutine, name: str | None = None):
        super().__init__(world)
        self.coro, self.name = coro, name
        self.fiber = world.spawn(getcurrent().process, self.go, 1e-6)

    def go(self) -> None:
        if self.fiber.cancelled:
            self.coro.close()
            return self.end("cancelled", None)
        try: self.coro.send(None)
        except StopIteration as e: self.end("result", e.value)
        except CancelledError: self.end("cancelled", None)
        except Killed: raise
        except BaseException as e: self.end("error", e)

    def cancel(self) -> None:
        if self.state: return
        self.fiber.cancelled = True
        self.world.wake(self.fiber)


class Timeout:
    "asyncio.timeout."
    def __init__(self, world: World, seconds: float): self.world, self.seconds = world, seconds
    async def __aenter__(self) -> None:
        f = getcurrent()
        self.fiber, self.before, end = f, f.deadline, self.world.now + self.seconds * f.process.rate
        f.deadline = end if f.deadline is None else min(f.deadline, end)
    async def __aexit__(self, *_: Any) -> None: self.fiber.deadline = self.before


class Asyncio:
    "The names that the product takes from `asyncio`."
    FIRST_COMPLETED, CancelledError = "FIRST_COMPLETED", CancelledError

    def __init__(self, world: World):
        self.world = world
        self.create_task = lambda coro, name=None: Task(world, coro, name)
        self.timeout = lambda s: Timeout(world, s)
        self.create_future = lambda: Future(world)
        self.get_running_loop = lambda: self

    def Event(self) -> "AsyncEvent": return AsyncEvent(self.world)
    def call_soon_threadsafe(self, fn: Callable, *args: Any) -> None:
        self.world.spawn(getcurrent().process, lambda: fn(*args), self.world.random.random() * 0.002)

    async def sleep(self, seconds: float) -> None:
        f, w = getcurrent(), self.world
        w.sleep(seconds)
        if f.deadline is not None and w.now >= f.deadline: raise TimeoutError

    async def to_thread(self, fn: Callable, *args: Any, **kw: Any) -> Any:
        "A fiber of its own: when the task is cancelled, the call goes on, as a thread does."
        box = Future(self.world)

        def call() -> None:
            try: box.set_result(fn(*args, **kw))
            except Exception as e: box.end("error", e)
        self.world.spawn(getcurrent().process, call)
        return await box

    async def gather(self, *aws: Any, return_exceptions: bool = False) -> list[Any]:
        tasks, found = [a if isinstance(a, Future) else Task(self.world, a) for a in aws], []
        for t in tasks:
            t.wait()
            found.append(t.value if return_exceptions else t.result())
        return found

    async def wait(self, tasks: Iterable[Task], return_when: str = "") -> tuple[list[Task], list[Task]]:
        "As soon as one is done."
        tasks, w, f = list(tasks), self.world, getcurrent()
        while not any(t.state for t in tasks):
            for t in tasks: t.waiting.append(f)
            try: w.park()
            finally:
                for t in tasks: t.waiting.remove(f)
        return [t for t in tasks if t.state], [t for t in tasks if not t.state]

    def run(self, coro: Coroutine) -> None:
        try: coro.send(None)
        except StopIteration: pass


class AsyncEvent:
    "asyncio.Event."
    def __init__(self, world: World): self.flag, self.future, self.world = False, Future(world), world
    def set(self) -> None:
        self.flag = True
        self.future.set_result(None)
    def clear(self) -> None: self.flag, self.future = False, Future(self.world)
    async def wait(self) -> None:
        if not self.flag: self.future.wait()
