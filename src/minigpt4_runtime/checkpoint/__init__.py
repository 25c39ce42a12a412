"""WHERE weights come from: published files in, a model folder out, and back into memory.

Owns   the model folder's format. Takes paths; gives folders and loaded models.
Never  knows the engine. Pickles are opened in one place only, and never run.
"""
