"""Plans that read or make a GGUF.

requests.py      which of them is asked for
options.py       what decides the bytes
model.py         what a GGUF's header says of the model
names.py, origins.py
                 whose tensors are whose: Hugging Face names and GGUF's
adapter*.py      an adapter as a GGUF
plan.py, planning.py, steps.py
                 a model as a GGUF, tensor by tensor
merging.py       an adapter merged into a GGUF
splitting.py     a GGUF split in its own layout
usage.py         the commands that use what was made
"""
