import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from rtfmri.backends import open_backend
from rtfmri.backends.cpu import _threads

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone lets it")


@pytest.fixture
def processors():
    """Return what this thread may use, and see that it is as before afterwards."""
    before = os.sched_getaffinity(0)
    yield before
    after = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before)
    assert after == before


@LINUX
def test_a_volume_is_worked_on_apart_from_the_workers_and_what_starts_then_is_free(processors):
    if len(processors) < 2:
        pytest.skip("one processor")
    context = _threads.keep_apart(len(processors))
    if not isinstance(context, _threads.Apart):
        pytest.skip("not OpenMP")
    ids = np.zeros(len(processors), np.int32)
    _threads._tell_ids(ids)
    with context:
        with context:
            pass
        mine = os.sched_getaffinity(0)
        workers = [os.sched_getaffinity(worker) for worker in ids[1:].tolist()]
    assert all(len(where) == 1 for where in (mine, *workers))
    assert set().union(mine, *workers) == processors
    command = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(child.stdout) == len(processors)
    seen = []
    thread = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
    thread.start()
    thread.join()
    assert seen == [processors]


@LINUX
def test_a_thread_is_free_again_after_an_error(processors):
    with pytest.raises(RuntimeError), open_backend("cpu").undisturbed():
        raise RuntimeError


@LINUX
def test_the_workers_make_room_wherever_the_thread_is(processors):
    context = _threads.keep_apart(len(processors))
    if not isinstance(context, _threads.Apart):
        pytest.skip("one processor, or not OpenMP")
    for processor in sorted(processors):
        os.sched_setaffinity(0, {processor})
        with context:
            assert os.sched_getaffinity(0) == {processor}
            homes = [os.sched_getaffinity(worker) for worker in context._workers]
        assert set().union(*homes) == processors - {processor}
        os.sched_setaffinity(0, processors)


@LINUX
def test_fewer_threads_than_processors_go_where_they_like(processors):
    with _threads.keep_apart(1):
        assert os.sched_getaffinity(0) == processors


def test_elsewhere_nothing_is_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    with _threads.keep_apart(2):
        pass
