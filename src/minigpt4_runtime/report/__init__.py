"""What judges show: tables, pages and files, for bench and evaluation alike."""
