"""Where tensors are computed: on the processor, or on one GPU."""

from __future__ import annotations

import torch
from torch import distributed

from schemas.errors import UserError
from schemas.settings import Device


def device_of(asked: Device, setting: str) -> torch.device:
    """The device that a setting asks for; ``auto`` is a GPU where there is one.

    Of several processes on a machine that ``torchrun`` started each takes a GPU of its own.

    Args:
        asked: The setting's value.
        setting: Its name, for the error.

    Raises:
        UserError: a GPU is asked for, and torch finds none.
    """
    found = torch.cuda.is_available()
    if asked == "cpu" or (asked == "auto" and not found):
        return torch.device("cpu")
    if not found:
        raise UserError(f"{setting} = 'cuda': torch {torch.__version__} finds no GPU on this machine; use 'cpu'")
    return torch.device("cuda", distributed.get_node_local_rank(fallback_rank=0))
