"""How fast, through the public API alone.

Owns   what is measured and how, the search for the largest batch, and what reports show of it.
Takes  a loaded model; gives points: one for each thing that was measured.
Never  knows how a model computes: where that is asked, the public API has a name for it.
"""
