"""HOW weights are held: a format is the tensors that stand for one matrix, and their product.

Owns   the contract of a format, the formats, and the table of them. Takes a matrix of floats; gives
       the tensors that stand for it.
Never  knows a folder, a device or a module; loads no torch before a weight is packed or multiplied.
"""
