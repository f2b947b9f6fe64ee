"""What is measured: pgfast and what a user would pick instead, each behind the same small interface (`base.py`)."""

from .base import Contender, Outcome, Probe, Request, Spec

__all__ = ["Contender", "Outcome", "Probe", "Request", "Spec"]
