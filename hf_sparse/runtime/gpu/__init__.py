"""GPU layouts of packed weights and their kernels.

delta.py, delta.cu      4-bit gaps between nonzeros: the most compact, for 1 to 4 tokens
paired.py, paired.cu    a bit an entry, ordered for tensor cores: 1 to 16 tokens
delta_triton.py         the delta layout where CUDA sources cannot be compiled
primitives.cuh          the machine instructions that both are made of
nvrtc.py                CUDA sources compiled at run time, and launched
plan.py, tune.py        how a packed weight is called, in the fastest configuration
"""
