"""The bounded pipeline: read ahead, transform, write behind, journal, commit, resume.

run.py        one conversion from lock to manifest, and how it is continued
pipeline.py   reader thread → transform thread → writer, with bounded bytes in flight
buffers.py    the bytes in flight
files.py      output files that grow as NAME.partial and are committed by rename
journal.py    what is already done, in lines that prove themselves
"""
