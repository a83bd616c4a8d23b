"""Models made for sparse training: Sparse-IFT (arxiv.org/abs/2303.11525) and the analysis of its masks.

A dense layer is replaced by a larger sparse one of the same FLOPs; the sparsity is the only knob.

ranks.py            how many branches, or which rank: exact arithmetic
layers.py           the replaced layers: parallel, factorized, doped; torch alone, so that it travels with a checkpoint
widths.py           the fourth member, wide: a config with larger widths
ift.py              sparse_ift(model, family, sparsity): any architecture, and what it costs
sparse_configs.py   SparseGPT2Config, SparseLlamaConfig, SparseResNetConfig: family, sparsity and training in the config
sparse_model.py     what their models share; sparse_gpt2.py, sparse_llama.py, sparse_resnet.py the models
fold.py             layers that are linear inside, made dense for inference
spectral.py         Ramanujan gaps of masks; singular_values.py how they are found
supar.py            initialisation and learning rate over widths and static sparsities
paper_flops.py      FLOPs as the released code counts them
"""
