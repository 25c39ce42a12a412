"""THE SOURCES of weights, and whether this machine has room for them.

Owns   every contact with the network, and the findings about this machine.
Takes  sources of the table in checkpoint/; gives files that are complete and checked.
Never  runs a model, and never gives an unchecked file its final name.
"""
