"""One-shot pruning: the visible loop (``prune``), its solvers (``obs``, ``admm``, ``repair``) and what they share."""
