"""HOW a step is computed where devices differ: attention over the cache, products with weights.

Owns   the kernel contract, the table of kernels and the reference that defines correct.
Takes  packed rows, a cache and a batch; gives attended rows.
"""
