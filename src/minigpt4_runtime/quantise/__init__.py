"""HOW a model gets smaller: a model folder of floats → one whose weights are integers.

Owns   the choice of a format for each part of a model, the rounding by what layers read, and the
       writing of the new folder.
Takes  a model folder, and pictures where rounding goes by them; gives a model folder.
Never  answers anything, and never changes the folder that it reads.
"""
