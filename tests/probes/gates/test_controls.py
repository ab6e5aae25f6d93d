"""Masks that gates are held against, and gates that need no training."""

from __future__ import annotations

import pytest
import torch

from probes.gates.compare import compare
from probes.gates.controls import FAMILIES, RANDOM_SEEDS, Magnitudes, magnitudes, mask_gates, masks
from probes.gates.data import forget_row, read_forget, read_retain, retain_row
from probes.gates.gates import Gates
from tests.probes.gates.rows import ROWS, SUMS
from vindex.errors import PatchError, ProbeError, TargetError


def test_every_control_turns_off_as_many_neurons_of_each_layer(random_gates):
    generator = torch.Generator().manual_seed(0)
    strengths = Magnitudes(*(torch.rand(4, 384, generator=generator) for _ in range(2)))
    made = list(masks(random_gates, 0.49, strengths))
    assert [name for name, _, _ in made].count("random") == RANDOM_SEEDS and len(made) == 4 + RANDOM_SEEDS
    for _, _, keep in made:
        assert torch.equal((~keep).sum(1), (~made[0][2]).sum(1))
    by_name = {name: ~keep for name, _, keep in made}
    assert strengths.forget[by_name["largest |h|"]].mean() > strengths.forget[by_name["random"]].mean() + 0.2
    ratio = strengths.forget / strengths.retain
    assert ratio[by_name["|h| ratio"]].median() > 2 * ratio.median()
    contrast = strengths.forget - strengths.retain
    assert contrast[by_name["|h| contrast"]].min() > contrast.median()


@pytest.mark.parametrize("by", ["ratio", "contrast", "largest", "random"])
def test_gates_without_training_turn_off_what_their_masks_do(atlas, files, tmp_path, by):
    """The same neurons as the control of that name of any gates with as many off in every layer."""
    made = mask_gates(atlas, by, forget=files["forget"], retain=files["retain"], output=tmp_path / "made", seed=2)
    read = Gates.read(tmp_path / "made")
    assert torch.equal(read.logits, made.logits) and read.training["by"] == by and read.scale_mode == "none"
    threshold = made.threshold_at(0.25)
    assert (~made.keep(threshold)).sum(1).tolist() == [96] * 4
    facts, sums = read_forget(files["forget"])[0], read_retain(files["retain"])[0]
    strengths = magnitudes(atlas, facts, sums, chat=False, seed=2)
    alike = [name for name, _, keep in masks(made, threshold, strengths) if torch.equal(keep, made.keep(threshold))]
    assert alike == ["gates"] + ([] if by == "random" else [FAMILIES[by]])
    with pytest.raises(TargetError, match="already exists"):
        mask_gates(atlas, by, forget=files["forget"], retain=files["retain"], output=tmp_path / "made")
    with pytest.raises(ProbeError, match="masks by 'x': expected one of ratio, contrast, largest, random"):
        mask_gates(atlas, "x")


def test_magnitudes_are_the_mean_absolute_activations_by_hand(atlas):
    from probes.live.hooks import capture

    facts, sums = [forget_row(ROWS[0], "x")], [retain_row(SUMS[0], "x")]
    found = magnitudes(atlas, facts, sums, chat=False)
    with torch.no_grad(), capture(atlas.model, [("hidden", 2)]) as seen:
        atlas.model(torch.tensor([atlas.tokenizer("The capital of France is")["input_ids"]]))
    torch.testing.assert_close(found.forget[2], seen["hidden", 2][0, -1].abs(), rtol=1e-4, atol=1e-6)
    with torch.no_grad(), capture(atlas.model, [("hidden", 0)]) as seen:
        atlas.model(torch.tensor([atlas.tokenizer("12+13=2")["input_ids"]]))
    torch.testing.assert_close(found.retain[0], seen["hidden", 0][0].abs().mean(0), rtol=1e-4, atol=1e-6)


def test_comparing_gates_states_chance():
    generator = torch.Generator().manual_seed(0)
    one, other = (Gates(torch.randn(4, 2000, generator=generator)) for _ in range(2))
    same, apart = compare(one, one), compare(one, other)
    assert same.correlation == pytest.approx(1) and all(o.jaccard == 1 for o in same.overlaps)
    assert abs(apart.correlation) < 0.05
    for overlap in apart.overlaps:
        assert overlap.jaccard == pytest.approx(overlap.chance, abs=0.02)
    mixed = compare(one, Gates(one.logits * 0.5 + other.logits * 0.5))
    assert mixed.overlaps[1].jaccard > 1.5 * mixed.overlaps[1].chance and mixed.layers[0] == pytest.approx(0.7, abs=0.1)
    with pytest.raises(PatchError, match="one set of gates is 4 × 2000, the other 4 × 10"):
        compare(one, Gates(torch.zeros(4, 10)))
