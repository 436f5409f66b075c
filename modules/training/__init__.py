"""The training loop: trainer, optimisers, checkpoints, self-critical stage.

Objective, loaders and scores are passed in.
"""
