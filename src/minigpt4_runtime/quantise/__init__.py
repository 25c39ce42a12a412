"""HOW a model gets smaller: a model folder of floats → one whose weights are integers.

Owns   the choice of a format for each part of a model, and the writing of the new folder.
Takes  a model folder; gives a model folder.
Never  runs a model, and never changes the folder that it reads.
"""
