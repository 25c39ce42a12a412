"""Speed measurements through the public API.

Owns   what is measured and how, the search for the largest batch, and the reports.
Takes  a loaded model; gives one point for each measurement.
"""
