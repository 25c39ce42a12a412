"""The image side, exported as graphs for other runtimes.

Owns   the export. Takes a model folder; gives a folder with graphs and export.json.
Never  loads a language model.
"""
