"""The arithmetic of a step: `reference` is plain torch and the oracle, `table` chooses a device's form."""
