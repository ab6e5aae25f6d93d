"""Lambda gates: one learnt sigmoid per FFN neuron, to tell the neurons that recall facts from those that reason.

masks      gates and masks as arrays: thresholds, off-fractions, random and magnitude masks
files      the published layout on disk, read and written        stats, compare   what a directory of gates says
apply      gates on a live model, soft or hard                    bake             gates in an ordinary checkpoint
data       rows of JSONL or parquet become texts with entities    encode           texts become token ids and masks
options    hyper-parameters and the published presets             losses, train    how gates are learnt
panels     what is asked of a gated model                         score, evaluate  and what it still answers
"""
