"""Matrix products in 8 bits: ``matmul`` is what layers call, ``recipe`` defines what a recipe is,
``recipes`` lists them."""
