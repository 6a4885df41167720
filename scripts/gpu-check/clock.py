"""How long something takes on a device."""

import statistics
import time

import torch


def seconds(device, run, times=10, warm=3):
    """The median of some runs, each waited for; a GPU's by its own clock."""
    for _ in range(warm):
        run()
    measured = []
    for _ in range(times):
        if device.startswith("cuda"):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            measured.append(begin.elapsed_time(end) / 1000)
        else:
            begun = time.perf_counter()
            run()
            measured.append(time.perf_counter() - begun)
    return statistics.median(measured)
