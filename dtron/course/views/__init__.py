"""Pictures of live objects: of rules, meshes, steps, schedules. Notebooks turn their arguments, and
the figures of docs/ are some of them."""
