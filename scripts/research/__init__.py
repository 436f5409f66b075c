"""Programs of the project's own studies: probes, negative inspection, folds and the phantom.

No training run needs them.
"""
