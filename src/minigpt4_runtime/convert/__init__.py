"""Published files → a model folder.

Owns   the published layouts, the reading of foreign files, and the check of the result.
Takes  paths; gives a model folder. Pickles are opened in one place only, and never run.
"""
