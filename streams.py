"""Streams of items through a few threads, in bounded memory, or processes, in order."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import cv2

GRACE_S = 5
"""Seconds that a process which draws goes on after SIGTERM, for the main one to end it in order."""


def ahead(work: Callable, items: Iterable, n_ahead: int, n_threads: int = 0) -> Iterator[tuple]:
    """(item, work(item)) in order, computed by threads (0: one a core, 8 at most) at most ``n_ahead`` items ahead:
    memory stays bounded.
    """
    n_threads = n_threads or min(8, os.cpu_count() or 1)
    waiting: deque = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > n_ahead:
                    item, future = waiting.popleft()
                    yield item, future.result()
            while waiting:
                item, future = waiting.popleft()
                yield item, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def in_processes(work: Callable, jobs: list, num_workers: int) -> Iterator:
    """``work(job)`` for every job, in order, by so many processes (-1: one a core; one for eight jobs at most; 0: by
    this one), for what holds the interpreter's lock, as matplotlib and betise do.
    """
    n_workers = min((os.cpu_count() or 1) if num_workers < 0 else num_workers, len(jobs) // 8)
    if n_workers < 1:
        yield from map(work, jobs)
        return
    pool = ProcessPoolExecutor(n_workers, mp_context=get_context("spawn"), initializer=_begin_process)
    try:
        with _signals_held_back():
            results = pool.map(work, jobs, chunksize=4)
        yield from results
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end, and do not reach processes that are started within. A terminal and
    ``timeout`` send them to all processes, and a pool whose processes end by themselves breaks with tracebacks.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    numbers, came = (signal.SIGINT, signal.SIGTERM), []
    is_main = threading.current_thread() is threading.main_thread()  # to which signals come through any thread
    handlers = {each: signal.signal(each, lambda number, frame: came.append(number)) for each in numbers if is_main}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # which processes take over
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for each, handler in handlers.items():
            signal.signal(each, handler)
        for each in came:
            signal.raise_signal(each)


def _begin_process() -> None:
    """One thread, and SIGTERM ends this process only where the main one has not done so GRACE_S later; Ctrl-C never."""
    cv2.setNumThreads(1)
    if hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(GRACE_S))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
