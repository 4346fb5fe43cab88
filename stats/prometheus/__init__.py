"""A Grafana board and alert rules for Prometheus, over the metrics that a server of ours has."""

from __future__ import annotations

import importlib.resources
from functools import cache

MEDIA_TYPES = {"board.json": "application/json", "alerts.yml": "application/yaml"}


@cache
def prometheus_files() -> dict[str, tuple[str, bytes]]:
    """Media type and content of each file by its name."""
    folder = importlib.resources.files(__package__)
    return {name: (kind, (folder / name).read_bytes()) for name, kind in MEDIA_TYPES.items()}
