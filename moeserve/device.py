"""What the engine must know of the device it runs on. With ops/ and comm/, the only place that tells CPU from GPU."""

from __future__ import annotations

import os

import torch


def resolve_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank; wanted: auto, cpu or cuda. Raises ValueError when there is no such device."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"device = cuda: rank {local_rank} of this host finds {count} GPUs; use device = cpu"
        )
    return torch.device("cuda", local_rank)


def set_threads(num_threads: int | None, local_ranks: int) -> int:
    """Give this rank its share of the cores, or what was asked for; the number taken."""
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(threads)
    return threads


def free_memory(device: torch.device, local_ranks: int) -> int:
    """Bytes that this rank may still take: all that is free on a GPU, its share of the host's on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    with open("/proc/meminfo") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    return sizes["MemAvailable"] // local_ranks
