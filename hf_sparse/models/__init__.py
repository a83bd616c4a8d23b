"""Models made for sparse training: Sparse-IFT (arxiv.org/abs/2303.11525) and the analysis of its masks.

A dense layer is replaced by a larger sparse one of the same FLOPs; the sparsity is the only knob.

layers.py           the replaced layers: parallel, factorized, doped; torch alone, so that it travels with a checkpoint
widths.py           the fourth member, wide: a config with larger widths
ift.py              sparse_ift(model, family, sparsity): any architecture, and what it costs
"""
