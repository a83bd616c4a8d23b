"""Packed weights on the CPU.

    panels.py      the layout and its functions: pack, unpack, check, linear, prepare
    library.py     finds, compiles and loads the kernel
    kernel.cpp     its C interface; plan.h (the layout), threads.h, avx512.h, avx2.h (the two instruction paths)
"""
