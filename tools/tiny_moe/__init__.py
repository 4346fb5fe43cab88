"""The parts of tools/train_tiny_moe.py: text, tokens, model, optimiser, training, evaluation, export."""
