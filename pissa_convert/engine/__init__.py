"""The bounded pipeline: read ahead, transform, write behind, journal, commit, resume; and verify afterwards.

run.py          one conversion from lock to manifest
destination.py  what DEST holds before work starts, and whether that may be continued or replaced
recovery.py     what of an interrupted run can be kept
pipeline.py     reader thread → transform thread → writer, with bounded bytes in flight
buffers.py      the bytes in flight
hashing.py      digests in threads beside them
reading.py      reads by position, and digests of whole files
files.py        output files that grow as NAME.partial and are committed by rename
journal.py      what is already done, in lines that prove themselves
verify.py       a finished folder against its manifest
comparison.py   its shards against the source's
"""
