"""Generation: continuous batching over a paged KV cache.

    from dtron.generation.engine import Engine
    from dtron.generation.sampling import Sampling
    from dtron.generation.scheduler import CacheSize
    from dtron.mesh import Layout
    from dtron.model.presets import preset
    from dtron.params import init
    from dtron.training.pipeline import one_stage

    m = preset("tiny")
    pipe = one_stage(m, 1, Layout())
    params = init(pipe.spec, m.dims(), 0, pipe.layout)
    engine = Engine(params, m, pipe, CacheSize(rows=4, pages=64, page=16))
    texts = {engine.add([5, 17, 2], tokens=8, sampling=Sampling(temperature=0.0)): []}
    while engine.busy:
        for event in engine.step():
            texts[event.number].append(event.token)

engine.py has the engine, and docs/generation.md the ideas.
"""
