"""Recipes: what several parts of the package make together."""
