"""Output that fits a grammar: from a request's description to masks of tokens, by llguidance. Imports no torch."""
