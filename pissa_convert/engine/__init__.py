"""The bounded pipeline: read ahead, transform, write behind, journal, commit, resume; and verify afterwards.

conduct.py      around every conversion: lock, state, time
run.py          any plan that walks a model's shards, from lock to manifest; and a split
merge.py        a merge by the same way: what a lane does
lora.py         the shorter way of a LoRA, which walks two adapters
gguf.py         a model's GGUF by the way of every model: what a lane does
gguf_adapter.py the shorter way of an adapter's GGUF
ordered.py      what the two shorter ways share
model_rows.py   a model's rows in the order of a GGUF
template_check.py, gguf_base_check.py
                whether a GGUF and a model, or an adapter, belong together
gguf_sizes.py   what other types would cost
factors.py      adapters' values, read by position or split again
base_check.py   whether an adapter belongs to a model
destination.py  what DEST holds before work starts, and whether that may be continued or replaced
recovery.py     what of an interrupted run can be kept
pipeline.py     reader → lanes → writer, with bounded bytes in flight
work.py         what passes between them, and what they ask of a plan
buffers.py      the bytes in flight
lanes.py        tensors that are transformed at the same time
workers.py      who works on the shards: this process, or with shard_task.py others
ledger.py       what is done, told to the journal and to the user
hashing.py      digests in threads beside them
reading.py      reads by position, and digests of whole files
files.py        output files that grow as NAME.partial and are committed by rename
journal.py      what is already done, in lines that prove themselves
verify.py       a finished folder against its manifest
verify_jobs.py  what there is to check, by target
comparison.py, side_by_side.py, *_check.py
                a result against what it was made from
"""
