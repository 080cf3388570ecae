"""What an evaluation leaves behind, and what is said of it.

records.py    a line per sample, and the file that names model, settings and questions
measures.py   numbers and intervals over them
compare.py    evaluations against a base, paired by question
published.py  figures of papers, each table with its protocol
tables.py     a comparison as Markdown, LaTeX and JSON
"""
