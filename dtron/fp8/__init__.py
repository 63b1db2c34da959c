"""Matrix products in 8 bits: ``matmul`` is what layers call, ``recipe`` says how scales are
chosen."""
