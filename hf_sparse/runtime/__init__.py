"""Sparse models that run faster: weights stay packed in memory, and kernels multiply with them as they are.

from hf_sparse import pack_for_inference, unpack

pack_for_inference(model)                 # every linear layer where packing is the fastest choice
model.generate(...)                       # as before: same names, same calls
unpack(model)                             # the stock model again, bit for bit

layouts.py         the layouts a weight can be packed in, and which devices have a kernel for them
packed_linear.py   the layer that takes the place of nn.Linear
pack.py            pack_for_inference and unpack: which layers, and what it saved
choose.py          the fastest of dense and packed for a shape on this machine, measured once
ops.py             the kernels as torch.library operators, for torch.compile
cpu/, gpu/         layouts and kernels
"""
