"""Finished groups on disk: none is lost when a run is killed, none is trained on twice."""

from gft_megatron.rollout.bank.bank import Bank, RecoveryReport, StoredGroup

__all__ = ["Bank", "RecoveryReport", "StoredGroup"]
