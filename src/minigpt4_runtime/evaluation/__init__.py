"""THE QUALITY of answers, judged through the public API only."""
