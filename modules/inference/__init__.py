"""A trained model applied and passed on: prediction, attention maps, torch.export programs, hub folders.

Nothing is trained here, and no data set is needed.
"""
