"""UniMatch and UniMatch V2: what is dropped of the features, and what their losses add up to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from darseg.data.batches import Batch
from darseg.data.classes import IGNORE
from darseg.errors import RecipeError
from darseg.methods import unimatch
from darseg.methods.acceptance import Above
from darseg.methods.consistency import Consistency
from darseg.methods.unimatch import complementary_masks, dropout_masks, spared_images
from darseg.model.backbone import Features
from darseg.model.heads import upsample
from darseg.model.network import Network, NetworkSpec
from darseg.training.loss import supervised
from darseg.training.stage import Stage
from test_methods import IMAGES, run, tensors
from test_online import labeled_at, make, views_at
from test_stage import CLASSES, DEEPLAB, PSPNET, build
from wording import refused

torch.set_num_threads(1)

V1 = Consistency("unimatch", batch=IMAGES, views=2, accept=Above(0.4), teacher=None)
V2 = Consistency("unimatch_v2", batch=IMAGES, views=2, accept=Above(0.4))
TOKENS = NetworkSpec("dpt", "timm/vit_tiny_patch16_224", CLASSES, head_channels=8)
PLUS = NetworkSpec("deeplabv3plus", "resnet18_half", CLASSES, 16, 8)
POSITIONS = torch.arange(40, 40 + IMAGES)


def images_for(network: Network) -> Tensor:
    side = network.sides.up(48)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, side, side), generator=generator, dtype=torch.uint8)


def batches_of(how: Consistency, **options) -> Sequence[Batch]:
    made = make(how, **options)
    with torch.no_grad():
        return made.label(made.state, made.network, [labeled_at(), views_at(strong=how.views)], 0).batches


# --- the network


@pytest.mark.parametrize("spec", [PSPNET, PLUS, TOKENS], ids=["pspnet", "deeplabv3plus", "transformer"])
def test_masks_of_one_change_no_bit(spec: NetworkSpec) -> None:
    if spec is TOKENS:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = spec.build()
    images, ends = images_for(network), []
    ones = tuple(torch.ones(len(images), width) for width in network.backbone.channels)
    labels = images[:, 0] % CLASSES
    start = {key: value.clone() for key, value in network.state_dict().items()}
    for masks in ((), ones):
        network.load_state_dict(start)
        network.zero_grad()
        torch.manual_seed(1)  # of the heads' dropout
        supervised(network, Batch(images, labels, ("a", "b"), feature_masks=masks), 0.4).backward()
        ends.append([parameter.grad for parameter in network.parameters()] + list(network.buffers()))
        ends[-1] = [None if value is None else value.clone() for value in ends[-1]]
    assert sum(value is not None for value in ends[0]) > 10
    for plain, masked in zip(*ends, strict=True):
        assert (plain is None and masked is None) or torch.equal(plain, masked)


@pytest.mark.parametrize("spec", [PSPNET, TOKENS], ids=["pspnet", "transformer"])
def test_the_heads_see_features_times_masks(spec: NetworkSpec) -> None:
    """Image by image and channel by channel, against the head on features made by hand."""
    if spec is TOKENS:
        pytest.importorskip("timm")
    torch.manual_seed(0)
    network = spec.build().eval()
    images = images_for(network)
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(2, width, generator=generator) for width in network.backbone.channels]
    with torch.no_grad():
        levels = [level.clone() for level in network.backbone(network.normalize(images))]
        for level, mask in zip(levels, masks, strict=True):
            for image in range(2):
                for channel in range(level.shape[1]):
                    level[image, channel] *= mask[image, channel]
        height, width = images.shape[-2:]
        wanted = upsample(network.head(Features(*levels)), (height, width))
        found = network(images, masks).main
        assert torch.allclose(found, wanted, atol=1e-5)
        assert not torch.allclose(found, network(images).main, atol=1e-3)


# --- what is dropped


def test_two_views_complement_each_other() -> None:
    for channels in ((6, 6, 6, 6), (200, 300, 50, 400)):
        first, second = complementary_masks(channels, POSITIONS, seed=(3, 1))
        assert [mask.shape for mask in first] == [(IMAGES, width) for width in channels]
        for mask, other in zip(first, second, strict=True):
            assert torch.equal(mask + other, torch.full_like(mask, 2.0))
            spared = (mask == 1).all(1)
            assert set(mask[~spared].unique().tolist()) <= {0.0, 2.0}
            # One of each pair, and the same at every level.
            assert spared.reshape(-1, 2).sum(1).tolist() == [1] * (IMAGES // 2)
            assert torch.equal(spared, (first[0] == 1).all(1))
        assert all(torch.equal(mask, first[0]) for mask in first) == (len(set(channels)) == 1)
    # Levels of unequal widths have draws of their own: where they overlap, half of the channels agree.
    kept = ~(first[0] == 1).all(1)
    agree = (first[0][kept, :200] == first[1][kept, :200]).double().mean()
    assert 0.4 < float(agree) < 0.6


def test_half_of_the_channels_are_dropped_by_position() -> None:
    """40,000 coins: beyond 4 standard deviations (0.01) chance has a probability of 1e-4."""
    (mask,) = dropout_masks((1000,), torch.arange(40), seed=(0,))
    assert set(mask.unique().tolist()) == {0.0, 2.0} and abs(float(mask.mean()) - 1) < 0.02
    (part,) = dropout_masks((1000,), torch.arange(7, 9), seed=(0,))
    assert torch.equal(part, mask[7:9])
    assert not torch.equal(dropout_masks((1000,), torch.arange(40), seed=(1,))[0], mask)
    spared = spared_images(torch.arange(20_000), seed=(0,))
    assert spared.reshape(-1, 2).sum(1).unique().tolist() == [1]
    assert abs(float(spared[::2].double().mean()) - 0.5) < 0.02
    assert torch.equal(spared_images(torch.arange(7, 9), seed=(0,)), spared[7:9])


def test_if_all_images_are_spared_v2_is_fixmatch_with_two_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        unimatch, "spared_images", lambda positions, seed: torch.ones(len(positions), dtype=torch.bool)
    )
    ends = [
        tensors(run(make(how, auxiliary_weight=0.4), Stage(steps=3)))
        for how in (V2, replace(V2, method="fixmatch"))
    ]
    assert all(torch.equal(ends[1][key], value) for key, value in ends[0].items())
    monkeypatch.undo()
    dropped = tensors(run(make(V2, auxiliary_weight=0.4), Stage(steps=3)))
    assert any(not torch.equal(ends[0][key], value) for key, value in dropped.items())


def test_both_views_of_v2_carry_their_masks_and_fixmatch_s_labels() -> None:
    _, first, second = batches_of(V2)
    for view, plain in zip((first, second), batches_of(replace(V2, method="fixmatch"))[1:], strict=True):
        assert torch.equal(view.images, plain.images) and torch.equal(view.labels, plain.labels)
        assert len(view.feature_masks) == 4 and not plain.feature_masks
    for mask, other in zip(first.feature_masks, second.feature_masks, strict=True):
        assert torch.equal(mask + other, torch.full_like(mask, 2.0)) and float((mask - 1).abs().max()) == 1


def test_v2_needs_two_views() -> None:
    with refused(RecipeError, "unimatch_v2", "there are 3", "online.strong_views: 2"):
        replace(V2, views=3)


# --- UniMatch


def test_dropped_features_learn_the_labels_of_the_weak_view_unmixed() -> None:
    views = views_at(strong=2)
    _, dropped, *strong = batches_of(V1)
    network = build(DEEPLAB).eval()
    with torch.no_grad():
        confidence, classes = network(views.weak).main.softmax(1).max(1)
    wanted = classes.to(torch.uint8).masked_fill(~views.inside | (confidence < 0.4), IGNORE)
    assert torch.equal(dropped.images, views.weak) and torch.equal(dropped.labels, wanted)
    assert dropped.divisor is not None and int(dropped.divisor) == int(views.inside.sum())
    assert len(strong) == 2 and not any(view.feature_masks for view in strong)
    assert any(not torch.equal(view.labels, wanted) for view in strong)
    for mask in dropped.feature_masks:
        assert set(mask.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_its_loss_is_twice_the_published_one(weight: float) -> None:
    """½ (L_x + ¼ L_s1 + ¼ L_s2 + ½ L_fp), each a sum over accepted pixels by all that are not padding."""
    made = make(replace(V1, weight=weight))
    batches = batches_of(V1)
    network = made.network.eval()

    def term(batch: Batch) -> Tensor:
        logits = network(batch.images, batch.feature_masks).main
        costs = F.cross_entropy(logits, batch.labels.long(), ignore_index=IGNORE, reduction="none")
        return costs.sum() / batch.count()

    with torch.no_grad():
        labeled, features, first, second = map(term, batches)
        published = 0.5 * (labeled + weight * (first / 4 + second / 4 + features / 2))
        loss, figures = made.loss(network, batches, 0)
    assert float(loss) == pytest.approx(2 * float(published), rel=1e-5)
    assert float(figures["loss_features"]) == pytest.approx(float(features), rel=1e-5)
    assert float(figures["loss_unlabeled"]) == pytest.approx(float(first + second) / 2, rel=1e-5)
