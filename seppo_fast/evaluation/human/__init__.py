"""Blind comparison of two models by people: draws a study, writes its page, reads the answers and tallies them."""
