"""A quick reader of a program's stream waits for ever: it is woken before the program is said to be finished."""

from __future__ import annotations

import queue
import threading
import time


class SlowEvent(threading.Event):
    """Gives the reader time between its waking and what the worker does next."""

    def set(self) -> None:
        super().set()
        time.sleep(0.3)


def fault() -> str | None:
    from sglang.lang.interpreter import ProgramState, StreamExecutor

    executor = object.__new__(StreamExecutor)
    vars(executor).update(
        queue=queue.Queue(), stream=True, stream_text_event=SlowEvent(), stream_var_event={}, variable_event={}
    )
    vars(executor).update(text_="", is_finished=False, use_thread=False)
    executor.queue.put(None)  # the program's end
    state = object.__new__(ProgramState)
    state.stream_executor = executor
    reader = threading.Thread(target=lambda: list(state.text_iter()), daemon=True)
    reader.start()
    executor._thread_worker_func()
    reader.join(timeout=2)
    return "the program has ended and its reader waits" if reader.is_alive() else None


if __name__ == "__main__":
    print(fault() or "mended")
