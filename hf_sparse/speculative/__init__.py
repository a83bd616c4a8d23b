"""Speculative decoding: a draft/verify loop, rules for when to stop drafting, bandits that choose among them, and drafters."""
