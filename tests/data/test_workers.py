import multiprocessing
import os
import signal
import subprocess
import sys
from itertools import islice

import cv2
import pytest
import torch
from torch.utils.data import get_worker_info

from contramask.data.index import build_index, load_index
from contramask.data.loader import Loader, exiting
from contramask.data.streaming import Streaming
from tests.data.server import serving
from tests.data.streams import expected, loaded, shard_stream, stream_of
from tests.data.tars import numbered_shards


def test_http_resume_asks_for_ranges_only(tmp_path):
    build_index(numbered_shards(tmp_path, [300] * 4))
    with serving(tmp_path) as server:
        urls = [f"{server.url}/part-00000{i}.tar" for i in range(4)]
        index = load_index(urls)
        assert index is not None
        some = stream_of(index, streams=1, block=48)
        server.sent.clear()
        data = shard_stream(some, start=1140)
        batches = loaded(data, 2, 3)
        assert [n for b in batches for n in b["numbers"]] == expected(some, 1140, 36)
        total = sum(s.bytes for s in index.shards)
        assert sum(n for *_, n in server.sent) < total / 4
        assert len(server.sent) <= 20


def state_of_worker(members, key):
    assert get_worker_info() is not None
    return torch.get_num_threads() + cv2.getNumThreads(), os.getpid()


def test_workers_are_deaf_to_signals_and_leave_with_their_parent(stream):
    data = shard_stream(stream, decode=state_of_worker)
    batches = iter(Loader(lambda: data, workers=1, streaming=Streaming()))
    first = next(batches)
    assert first["numbers"] == [2] * 12
    pid = first["seeds"][0]
    (worker,) = (w for w in multiprocessing.active_children() if w.pid == pid)
    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, one)
    assert all(list(islice(batches, 5))[-1]["numbers"])
    worker.join(0.2)
    assert worker.is_alive()
    exiting(None, os.getpid()).value = True  # as at the exit of this process
    worker.join(10)
    exiting(None, os.getpid()).value = False
    assert worker.exitcode == 0
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(islice(batches, 9))


CRASH = """
import sys
from contramask.data.index import load_index
from contramask.data.loader import Loader
from contramask.data.streaming import Streaming
from tests.data.streams import shard_stream, stream_of
index = load_index(sys.argv[1:])
batches = iter(Loader(lambda: shard_stream(stream_of(index)), workers=2, streaming=Streaming()))
next(batches)
raise KeyError("amid a batch")  # the loader lives on while Python exits
"""


def test_a_program_that_crashes_amid_a_batch_ends(index):
    command = [sys.executable, "-c", CRASH, *(shard.url for shard in index.shards)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().endswith("KeyError: 'amid a batch'")
