"""Sizes and durations as people read them."""

from __future__ import annotations


def human_size(size: float) -> str:
    """Bytes in powers of 1,000: 226 MB, 1.17 GB."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def human_time(seconds: float) -> str:
    """A duration: 45 s, 3 min 20 s, 2 h 5 min, 98 days 21 h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
