"""The 14 CheXpert observations: the rule-based labeler, CheXbert, and tables of labels by study.

Scores made from labels belong in evaluation.
"""
