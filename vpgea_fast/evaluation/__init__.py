"""What an evaluation leaves behind, and what is said of it.

records.py    a line per sample, and the file that names model, settings and questions
suites.py     the papers' benchmarks, as entries of eval.data
header.py     what eval.json says
drawing.py    answers drawn into a folder, wave by wave; folder.py: that folder
measures.py   numbers and intervals over them
compare.py    evaluations against a base, paired by question
published.py  figures of papers, each table with its protocol
tables.py     a comparison as Markdown, LaTeX and JSON
"""
