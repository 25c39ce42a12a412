"""Tables, pages and files of reports, shared by bench and evaluation."""
