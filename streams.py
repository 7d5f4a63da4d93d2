"""Working ahead: a stream of items through a few threads, in order, in bounded memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


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
