"""Packed sparse weights: codecs on plain tensors (``pack``, ``unpack``) and whole checkpoints (``checkpoint``)."""

from hf_sparse.formats.checkpoint import PackReport, pack_checkpoint, plan_checkpoint, save_packed, unpack_checkpoint

__all__ = ["PackReport", "pack_checkpoint", "plan_checkpoint", "save_packed", "unpack_checkpoint"]
