from __future__ import annotations

import torch

from medmap.core.counted import Counted


def test_what_lives_at_a_time_is_counted() -> None:
    with Counted() as counted:
        kept = torch.zeros(1000)
        for _ in range(5):
            torch.zeros(2000)
        one = kept[:10]  # the same memory
    assert counted.most == 4 * 3000
    assert one.numel() == 10
