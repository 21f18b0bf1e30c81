"""Selection of the torch device."""

from __future__ import annotations

import torch
from torch import distributed

from schemas.errors import UserError
from schemas.settings import Device


def select_device(value: Device, setting: str) -> torch.device:
    """Return the device of a setting; ``auto`` selects a GPU if there is one.

    Processes that ``torchrun`` started on one machine use one GPU each.

    Args:
        value: Value of the setting.
        setting: Name of the setting, for the error message.

    Raises:
        UserError: the setting is ``cuda`` and torch finds no GPU.
    """
    gpu_available = torch.cuda.is_available()
    if value == "cpu" or (value == "auto" and not gpu_available):
        return torch.device("cpu")
    if not gpu_available:
        raise UserError(f"{setting} = 'cuda': torch {torch.__version__} finds no GPU on this machine; use 'cpu'")
    return torch.device("cuda", distributed.get_node_local_rank(fallback_rank=0))
