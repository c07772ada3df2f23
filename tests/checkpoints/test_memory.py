"""What a request held at its peak is its own to say, also while others run."""

import gc
import threading

import mlx.core as mx
import pytest

from mlx_diffusiongemma.checkpoints.memory import PeakMemory

MB = 2**20


def hold(megabytes):
    mx.clear_cache()
    array = mx.zeros((megabytes * MB,), mx.uint8)
    mx.eval(array)
    del array
    mx.clear_cache()


@pytest.fixture
def base():
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory()


def test_a_request_that_begins_later_does_not_forget_an_earlier_ones_peak(base):
    long = PeakMemory()
    hold(64)
    short = PeakMemory()
    hold(16)
    assert 16 * MB <= short.stop() - base < 20 * MB
    hold(32)
    assert 64 * MB <= long.stop() - base < 68 * MB


def test_a_peak_ends_with_its_request(base):
    first = PeakMemory()
    hold(8)
    peak = first.stop()
    hold(64)
    assert first.stop() == peak and 8 * MB <= peak - base < 12 * MB


def test_one_that_is_forgotten_is_no_trouble(base):
    PeakMemory()
    gc.collect()
    threads = [threading.Thread(target=lambda: [PeakMemory().stop() for _ in range(200)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
