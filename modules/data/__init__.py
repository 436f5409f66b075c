"""Studies as batches: annotation files, tokenizers, images and their caches, data sets and loaders.

Nothing here knows of a network or a loss.
"""
