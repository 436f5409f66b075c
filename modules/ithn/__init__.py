"""The method of the paper (arXiv 2305.07176): losses, synthesis of harder negatives, the objective over any backbone.

No backbone, data set or flag is known here: the backbone is passed in, settings come as ITHNSettings.
"""
