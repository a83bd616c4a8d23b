"""Packed weights on the CPU, and dense ones that stay as they are.

The Python side:

    layout.py       what a packed weight is: pack, unpack, check
    multiply.py     ``y = x W^T + b`` with it
    panels.py       both for exact weights; panels_int8.py for weights of 8 bits
    dense.py        the same product with a dense weight, in place
    arena.py        many weights side by side in huge pages
    library.py      finds, compiles and loads the kernel

The kernel: kernel.cpp is its C interface, plan.h the layout, threads.h the parallel regions; avx512*.h and avx2*.h are the
two instruction paths.
"""
