"""Moving experts' weights between slots while they serve."""

from moeserve.comm.weight_mover.protocol import TransferError, WeightMover, WrongChecksum

__all__ = ["TransferError", "WeightMover", "WrongChecksum"]
