"""ONE question about many images: which images, in what order, and where the results go.

Owns   the search for images, the order of a long run, result files and kept dialogues.
Takes  paths and tickets; gives records. The command line, a notebook or a job uses it alike.
"""
