"""Model cards of measured facts, and the way to the Hub. Nothing is in a card that was not measured or configured; a section
without
data is left out.
"""

from hf_sparse.hub_cards.push import push
from hf_sparse.hub_cards.sparsity_card import SparsityCard

__all__ = ["SparsityCard", "push"]
