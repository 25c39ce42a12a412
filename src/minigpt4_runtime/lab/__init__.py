"""WHAT HAPPENS INSIDE: the model's own modules, opened for study beside the engine.

Owns   differentiable passes, kept layers, hooks, edits and searches step by step.
Takes  a LoadedModel, whose weights it shares; gives tensors.
Never  touches what the engine computes with, or what it has cached.
"""
