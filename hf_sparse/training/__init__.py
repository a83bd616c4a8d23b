"""Training with zeros: masks that stay, move or grow while an optimizer runs."""
