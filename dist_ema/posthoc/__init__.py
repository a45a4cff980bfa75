"""Choose the decay after training: reconstruct any average from the snapshots of two. No torch.

from dist_ema.posthoc import reconstruct

reconstruct("run/snapshots", sigma_rel=0.05, out="run/best")
"""

from __future__ import annotations

from .profiles import Profile, coefficients
from .snapshots import REFUSED, WARNED, Snapshots, Stored, reconstruct

__all__ = ["REFUSED", "WARNED", "Profile", "Snapshots", "Stored", "coefficients", "reconstruct"]
