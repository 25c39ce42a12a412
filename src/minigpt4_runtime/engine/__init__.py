"""WHEN it runs: which tokens are computed next, and what is kept between steps.

Owns   requests while they are answered. Takes ids and pixels; gives ids.
Never  knows text, HTTP or a concrete backend.
"""
