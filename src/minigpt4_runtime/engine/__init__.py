"""WHEN it runs: the choice of the next tokens, and the state between steps.

Owns   requests while they are answered. Takes ids and pixels; gives ids.
Never  knows text, HTTP or a concrete backend.
"""
