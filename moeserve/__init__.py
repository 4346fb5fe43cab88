"""moeserve: wide expert-parallel serving of mixture-of-experts models. Imports nothing heavy."""

__version__ = "0.1.0"
