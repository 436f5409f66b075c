"""Raw downloads to annotation.json and image folders, and checks of both.

Nothing here is needed once a training runs.
"""
