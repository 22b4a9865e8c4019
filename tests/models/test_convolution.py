"""Halves of a small volume give what torch gives for the whole, and only where they are of use."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from medmap.core.modality import GLIOMA_MRI
from medmap.models import BACKBONES, build_backbone
from medmap.models.convolution import LOOP_NUMBERS, Conv3d, whole_volumes

sizes = st.tuples(*[st.integers(1, 12)] * 3)


@settings(deadline=None)
@given(sizes, st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.sampled_from(["zeros", "reflect"]), st.booleans())
def test_a_small_volume_alone_is_convolved_as_torch_does(
    size: tuple[int, int, int], kernel: int, stride: int, mode: str, last: bool
) -> None:
    """Output and all gradients; in halves, which only a sample without company is cut into."""
    size = tuple(max(n, 3) for n in size)
    torch.manual_seed(0)
    ours = Conv3d(2, 3, kernel, stride, padding=kernel // 2, padding_mode=mode)
    theirs = nn.Conv3d(2, 3, kernel, stride, padding=kernel // 2, padding_mode=mode)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 2, *size).to(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    outs, gradients = [], []
    for conv in (ours, theirs):
        own = x.clone().requires_grad_()
        outs.append(conv(own))
        gradients.append(torch.autograd.grad(outs[-1].square().sum(), [own, *conv.parameters()]))
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("samples", "edge", "halved"), [(1, 8, True), (2, 8, False), (1, 60, False)])
def test_only_a_small_volume_alone_is_halved(
    samples: int, edge: int, halved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    plain = F.conv3d
    monkeypatch.setattr(F, "conv3d", lambda x, *rest: (seen.append(len(x)), plain(x, *rest))[1])
    conv = Conv3d(8, 2, 3, padding=1)
    conv(torch.zeros(samples, 8, edge, edge, 4))
    with whole_volumes():
        conv(torch.zeros(samples, 8, edge, edge, 4))
    assert seen == [2 if halved else samples, samples]
    assert (8 * edge**2 <= LOOP_NUMBERS) == (edge == 8)


@pytest.mark.parametrize("size", [(2, 2, 2), (2, 5, 4), (2, 1, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_bf16_gradients_of_two_planes_are_no_garbage(size: tuple[int, int, int], stride: int) -> None:
    """What was in memory before, made large here, must not come back as a gradient of the kernel."""
    torch.manual_seed(0)
    conv, x = Conv3d(16, 16, 3, stride, padding=1), torch.randn(1, 16, *size)
    exact = torch.autograd.grad(conv(x).square().sum(), [*conv.parameters()])
    for _ in range(5):
        left = [
            torch.full((n,), 1e33, dtype=kind) for n in (10**3, 10**4, 10**5) for kind in (torch.float, torch.bfloat16)
        ]
        del left
        with torch.autocast("cpu", torch.bfloat16):
            rounded = conv(x)
        found = torch.autograd.grad(rounded.float().square().sum(), [*conv.parameters()])
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0.05 * float(other.abs().max()))


def test_a_recorded_graph_holds_for_every_size() -> None:
    edge = torch.export.Dim.AUTO
    given = torch.zeros(1, 2, 6, 6, 6)
    recorded = torch.export.export(Conv3d(2, 3, 3, padding=1), (given,), dynamic_shapes=({2: edge, 3: edge, 4: edge},))
    assert recorded.module()(torch.zeros(1, 2, 9, 10, 11)).shape == (1, 3, 9, 10, 11)


@pytest.mark.parametrize("name", BACKBONES)
def test_every_network_begins_by_calling_a_voxel_background(name: str) -> None:
    torch.manual_seed(0)
    network = build_backbone(name, GLIOMA_MRI, 4, "tiny").eval()
    images = {name: torch.randn(1, 1, 16, 16, 16) for name in GLIOMA_MRI}
    for subset in network.supported_subsets():
        kept = torch.tensor([[name in subset for name in GLIOMA_MRI]])
        with torch.no_grad():
            share = network.decode(network.encode(images, kept), kept).logits.softmax(dim=1).mean(dim=(0, 2, 3, 4))
        assert share[0] > 0.8
        assert share[1:].min() > 0.005, "no class may begin out of reach"
