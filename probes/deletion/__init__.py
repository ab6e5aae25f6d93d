"""Delete one fact from a model with a rank-1 change of one gate_proj, and measure what else changed.

`forward` and `geometric` compute a `Delta`, `baselines` a `Wide` change, and none touches the model;
`probes.live.hooks.patched` applies it and restores the weight bit for bit; `layer` is the rule by which a method gets
its layer; `measure` runs real forward passes and knows nothing of the methods; `certificate` attacks what was deleted;
`verdict` holds the figures to fixed limits; `experiment` does all this to one change, `delete` to every method's, or to
a patch that is there.
"""
