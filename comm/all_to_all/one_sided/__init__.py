"""Expert all-to-all by writing into the other ranks' memory: one layout, one protocol, several engines."""
