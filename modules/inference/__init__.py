"""A trained model on studies of anybody: prediction, attention maps, torch.export programs, the hub's format.

Nothing is trained here.
"""
