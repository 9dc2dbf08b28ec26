"""What a loss is multiplied by in fp16."""

from __future__ import annotations

START_SCALE = 65536.0  # torch.amp.GradScaler's own figures
GROWTH_INTERVAL = 2000


class LossScale:
    """What a loss is multiplied by, so that fp16 gradients do not vanish: doubled after 2,000 good updates, halved
    after one with gradients that overflowed (arXiv 1710.03740 §3.2). 1 for other precisions."""

    def __init__(self, active: bool) -> None:
        self.active = active
        self.value = START_SCALE if active else 1.0
        self.good_updates = 0

    def learn(self, finite: bool) -> None:
        """Adjust after an update whose gradients were finite, or not."""
        if not finite:
            self.value, self.good_updates = max(self.value / 2, 1.0), 0
            return
        self.good_updates += 1
        if self.active and self.good_updates % GROWTH_INTERVAL == 0:
            self.value *= 2
