"""Resident memory of this process, as counted by the kernel."""

from __future__ import annotations


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes.

    Not getrusage's ru_maxrss, which in a child begins with its parent's peak.
    """
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024
