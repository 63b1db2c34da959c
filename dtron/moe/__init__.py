"""Mixture of experts: a feed-forward layer of many, of which each token uses a few.

config.py has the choices, router.py says which token goes to which experts, dispatch.py brings the
tokens there and back, experts.py computes, layer.py puts these together.
"""
