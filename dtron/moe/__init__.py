"""Mixture of experts: many feed-forward layers, of which each token uses a few.

config.py has the sizes and settings. router.py chooses the experts of each token. dispatch.py sends
tokens to the ranks of their experts and back. experts.py computes. layer.py combines the four.
"""
