"""Every decision of a conversion, made from headers alone: a plan reads no tensor's values and writes nothing.

requests.py      from keyword arguments to the plan of a target
split_plan.py    --to pissa: what becomes of each tensor, and the layout of the result
targets.py       which weights are split, as PEFT would; naming.py and architectures.py: what transformers calls them
quant_*.py       --to qpissa
lora_*.py        --to lora; init_planning.py: where its initial adapter comes from
merge_*.py       --to merged
quantised_source.py
                 a merge that reads a 4-bit base back
gguf/            everything with a GGUF in it
steps.py         what a plan consists of: which bytes are read, what becomes of them, where they go
fingerprint.py   what must not change for an interrupted conversion to be continued
estimate.py      how long it will take
"""
