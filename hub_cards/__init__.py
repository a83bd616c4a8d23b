"""Model cards of measured facts. Nothing is in a card that was not measured or configured; a section without data is left out.

Here: the short card that ``hf-sparse prune`` writes beside a pruned model (:func:`write_card`).
"""

from hf_sparse.hub_cards.card import render_card, write_card

__all__ = ["render_card", "write_card"]
