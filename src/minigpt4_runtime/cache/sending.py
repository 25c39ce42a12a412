"""The way of the host's numbers to a device.

Owns   `send`. Takes a tensor on the host; gives it on a device.
Never  waits, as a plain copy does, until the device has done all that it was given before.
"""

import torch
from torch import Tensor


def send(host: Tensor, device: torch.device) -> Tensor:
    """Any shape and dtype, on a device: work that is given to it later finds the numbers there.

    On a CPU it is the same tensor. `host` may be freed or forgotten, but not changed afterwards.
    """
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
