"""Plans: the memory and the time of a training step on any mesh, without a GPU.

plan_step.py runs the program of each pipeline rank on fake tensors. From there:

    operators.py    what an operator computes, reads and writes
    graph_cost.py   the kernels and the memory of a compiled graph
    rank_trace.py   the memory and the operators of one rank
    fake_mesh.py    one rank of a mesh of any size
    gpu.py          the measured rates of a GPU
    step_time.py    operators and rates: milliseconds
    search.py       all meshes and options of a number of GPUs
"""
