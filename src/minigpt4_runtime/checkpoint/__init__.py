"""WHERE weights are kept: the model folder, read into memory and written whole.

Owns   the folder's format, its loading, and the names of models. Takes paths; gives models.
Never  reads published files: that is `convert/`.
"""
