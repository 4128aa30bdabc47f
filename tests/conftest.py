"""What all tests share: which are selected, and hypothesis without a clock.

`full` tests are deselected unless -m names them (`-m full`). `gpu` tests are skipped, with that reason, where there is
no CUDA device. Test files are packages under `tests`, so that ranks can import their functions by name.
"""

import os

import pytest
from hypothesis import settings

# Shared machines stall for seconds, which says nothing about the code; examples are the same in every run on CI.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for, visibly: as deselected, or as skipped with a reason."""
    if "full" not in (config.option.markexpr or ""):
        left_out = [item for item in items if item.get_closest_marker("full")]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker("full")]
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def _has_gpu() -> bool:
    import torch  # only when a test needs it: collecting the rules stays quick

    return torch.cuda.is_available()
