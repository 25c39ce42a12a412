"""Leaving home: the image side as files that other runtimes run.

Owns   the making of graphs. Takes a model folder; gives a folder with graphs and export.json.
Never  knows the engine, and loads no language model.
"""
