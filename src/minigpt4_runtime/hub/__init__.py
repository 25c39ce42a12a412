"""FROM WHERE weights come, and whether this machine has room for them.

Owns   every contact with the network, and what is judged about this machine.
Takes  sources of the table in checkpoint/; gives files that are whole and checked.
Never  runs a model, and never keeps a byte under a file's name before all of it is checked.
"""
