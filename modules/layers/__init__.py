"""Network parts that the backbones are made of: attention, memories, prototypes, visual extractors.

Tensors in, tensors out: nothing here knows of reports, files or flags.
"""
