"""Does a network keep what `Backbone` promises? Shipped, so that people run it on their own network as well.

A law is one small function that builds the network, tries to break one promise over every subset of sequences the
network supports, and returns the fault in words ("" when there is none). The table of laws stands at the foot.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from sysconfig import get_path
from traceback import extract_tb

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from medmap.core.modality import ModalitySet
from medmap.errors import MedmapError
from medmap.models.backbone import Backbone, Decoded, Size3
from medmap.models.trial import Images, Net, Trial, answering, mask_of, moved, proper_subsets

LIBRARIES = tuple(get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
MEDMAP = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Finding:
    """What became of one law: its name, whether it holds, and the law's sentence or the fault that was found."""

    law: str
    ok: bool
    detail: str


def check_backbone(build: Callable[[], Backbone], *, size: Size3 = (15, 16, 13), seed: int = 0) -> tuple[Finding, ...]:
    """Hold a network to every law of `LAWS`, over all the subsets it supports, on the CPU.

    build: makes the network with fresh random weights; called several times
    size:  (X, Y, Z) in voxels of the awkward image; the other trials use it rounded up to whole strides
    seed:  of weights, images and dropout; the caller's random state is left alone

    A law in which the network raises counts as broken, with the exception as its detail. Returns one finding a law.

    >>> from medmap.models.unet import UNet
    >>> pair = ModalitySet(("t1c", "t2f"))
    >>> faults(check_backbone(lambda: UNet(pair, classes=3, size="tiny")))
    []
    """
    trial = Trial(build, size, seed)
    with torch.random.fork_rng(devices=[]):
        return tuple(_judged(law, trial) for law in LAWS)


def faults(findings: Iterable[Finding]) -> list[Finding]:
    """The findings that are not ok: ``assert not faults(check_backbone(build))`` is a whole test."""
    return [finding for finding in findings if not finding.ok]


def _judged(law: str, trial: Trial) -> Finding:
    sentence, broken_by = LAWS[law]
    try:
        fault = broken_by(trial)
    except Exception as error:  # whatever a stranger's network does is a finding, not a crash of the check
        fault = f"raised {type(error).__name__}: {str(error).partition(chr(10))[0]}{_place(error)}"
    return Finding(law, not fault, fault or sentence)


def _place(error: Exception) -> str:
    """Where in the network's own code an exception came from, as `` (FILE.py, line N)``."""
    if isinstance(error, MedmapError):  # its message names the thing
        return ""
    frames = [frame for frame in extract_tb(error.__traceback__) if not frame.filename.startswith(LIBRARIES)]
    strangers = [frame for frame in frames if not frame.filename.startswith(MEDMAP)]
    return next((f" ({Path(f.filename).name}, line {f.lineno})" for f in reversed(strangers or frames)), "")


def _members(trial: Trial) -> str:
    torch.manual_seed(trial.seed)
    net: Net = trial.build()
    wanted = ("modalities", "classes", "strides", "separable", "encode", "decode", "supported_subsets")
    missing = [name for name in wanted if not hasattr(net, name)]
    if not isinstance(net, nn.Module):
        return f"found a {type(net).__name__}; a torch.nn.Module is expected"
    if missing:
        return f"{type(net).__name__} lacks {', '.join(missing)}; see medmap.models.backbone.Backbone"
    subsets = net.supported_subsets()
    strangers = [str(s) for s in subsets if not set(s) <= set(net.modalities)]
    if not subsets or strangers:
        return f"supported_subsets holds {strangers or 'nothing'}; expected subsets of {net.modalities}"
    return ""


def _shape(trial: Trial) -> str:
    net = trial.network()
    for training, size in ((False, trial.odd), (True, trial.odd), (False, trial.even(net))):
        images = trial.images(net, 2, size)
        with torch.no_grad():
            for subset, answer in trial.answers(net.train(training), images):
                fault = _misshapen(answer, (2, net.classes), size)
                if fault:
                    return f"{subset} at {size} voxels: {fault}"
    return ""


def _misshapen(answer: Decoded, rows_and_classes: tuple[int, int], size: Size3) -> str:
    expected = (*rows_and_classes, *size)
    if tuple(answer.logits.shape) != expected:
        return f"logits are {tuple(answer.logits.shape)}; expected {expected}"
    for name, auxiliary in answer.auxiliary.items():
        if tuple(auxiliary.logits.shape[:2]) != rows_and_classes or auxiliary.logits.ndim != 5:
            return f"auxiliary {name} is {tuple(auxiliary.logits.shape)}; expected {rows_and_classes} and three axes"
    for name, loss in answer.terms(_some_truth(answer)).items():
        if loss.ndim:
            return f"loss {name} is {tuple(loss.shape)}; expected a scalar"
    return ""


def _some_truth(answer: Decoded) -> Tensor:
    """Random classes, for loss terms that want the truth."""
    rows, classes, *size = answer.logits.shape
    return torch.randint(classes, (rows, *size))


def _total(answer: Decoded) -> Tensor:
    """A scalar that depends on every logit (with weights of its own, so that no symmetry cancels) and every loss."""
    every = [answer.logits, *(auxiliary.logits for auxiliary in answer.auxiliary.values())]
    own = answer.terms(_some_truth(answer)).values()
    return sum((torch.randn_like(z) * z).mean() for z in every) + sum(own, torch.zeros(()))


def _finite(trial: Trial) -> str:
    net = trial.network()
    images = {name: torch.cat([x, 0 * x, 0 * x + 1]) for name, x in trial.images(net).items()}
    kinds = ("an ordinary image", "an image of zeros", "an image of ones")
    for subset in net.supported_subsets():
        mask = mask_of(net, subset, subset, subset)
        for what, logits in zip(kinds, trial.logits(net, images, mask, mask), strict=True):
            if not logits.isfinite().all():
                return f"{subset}, {what}: logits are NaN or infinite in eval mode"
    for row, what in enumerate(kinds):
        fault = _train_not_finite(trial, net, {name: x[[row, row]] for name, x in images.items()})
        if fault:
            return f"{what}: {fault}"
    return ""


def _train_not_finite(trial: Trial, net: Net, images: Images) -> str:
    total = torch.zeros(())
    for subset, answer in trial.answers(net.train(), images):
        total = total + _total(answer)
        if not total.isfinite():
            return f"{subset}: logits, auxiliary logits or losses are NaN or infinite in train mode"
    net.zero_grad()
    total.backward()
    bad = [name for name, p in net.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    return f"the gradient of {_some(bad)} is NaN or infinite" if bad else ""


def _gradients(trial: Trial) -> str:
    dead = _without_gradient(trial, shift=0)
    if dead:  # the gradient of one number may be 0 by chance: of a bias before a normalisation it is all rounding
        again = _without_gradient(trial, shift=1)
        dead = [name for name in dead if name in again]
    return f"no subset gives a gradient to {_some(dead)}" if dead else ""


def _without_gradient(trial: Trial, shift: int) -> list[str]:
    net = trial.network(shift).train()
    answers = trial.answers(net, trial.images(net, 2))
    sum((_total(answer) for _, answer in answers), torch.zeros(())).backward()
    learned = [(name, p.grad) for name, p in net.named_parameters() if p.requires_grad]
    return [name for name, gradient in learned if gradient is None or not bool(gradient.any())]


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _leakage(trial: Trial) -> str:
    net = trial.network()
    images = trial.images(net)
    with torch.no_grad():
        dropped = {subset: answer.logits for subset, answer in trial.answers(net, images)}
    for subset, others in proper_subsets(net):
        names, kept, wild = "+".join(others), mask_of(net, subset), trial.wild(images, others)
        alone = trial.logits(net, {name: images[name] for name in subset}, kept, kept)
        for what, logits in (
            ("is not seen and holds noise", trial.logits(net, wild, kept, kept)),
            ("is seen but not kept", dropped[subset]),
            ("is seen, not kept and holds noise", trial.logits(net, wild, mask_of(net, net.modalities), kept)),
        ):
            fault = moved(alone, logits)
            if fault:
                return f"kept {subset}: logits with {names} removed and logits when {names} {what} {fault}"
        fault = _dropped_in_training(trial, net, subset, others)
        if fault:
            return fault
    return ""


def _dropped_in_training(trial: Trial, net: Net, subset: ModalitySet, others: list[str]) -> str:
    images = trial.images(net, 2)
    seen, kept = mask_of(net, net.modalities, net.modalities), mask_of(net, subset, subset)
    one, two = (
        trial.logits(copy.deepcopy(net).train(), given, seen, kept) for given in (images, trial.wild(images, others))
    )
    fault = moved(one, two)
    names = "+".join(others)
    return f"train mode, kept {subset}: logits for two different {names}, seen but not kept, {fault}" if fault else ""


def _statistics(trial: Trial) -> str:
    net = trial.network()
    for subset, others in proper_subsets(net):
        fault = _absent_values(trial, net, subset, others)
        if fault:
            return fault
    for name in answering(net) if len(net.modalities) > 1 else ():
        fault = _absent_rows(trial, net, name)
        if fault:
            return fault
    return ""


def _absent_values(trial: Trial, net: Net, subset: ModalitySet, others: list[str]) -> str:
    """Train mode, the second sample without ``others``: what stands in its place moves neither logits nor buffers."""
    images, names = trial.images(net, 2), "+".join(others)
    masks = mask_of(net, net.modalities, subset), mask_of(net, subset, subset)
    one, two = copy.deepcopy(net).train(), copy.deepcopy(net).train()
    fault = moved(trial.logits(one, images, *masks), trial.logits(two, trial.wild(images, others, slice(1, 2)), *masks))
    where = f"train mode, kept {subset}, {names} not seen in one sample and its voxels changed"
    if fault:
        return f"{where}: logits {fault}"
    for (name, a), (_, b) in zip(one.named_buffers(), two.named_buffers(), strict=True):
        if moved(a.double(), b.double()):
            return f"{where}: buffer {name} moves"
    return ""


def _absent_rows(trial: Trial, net: Net, name: str) -> str:
    """One patient twice, all sequences alike: how many of these equal images there are must not matter.

    It matters when a normalisation counts the zeros (or anything else) that stand for an absent image. Only the
    normalisations learn here, the rest stays in eval mode, so that no dropout tells the two passes apart.
    """
    net = copy.deepcopy(net).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.train()
    same = next(iter(trial.images(net).values())).expand(2, -1, -1, -1, -1)
    images = dict.fromkeys(net.modalities, same)
    without = net.modalities.pick(other for other in net.modalities if other != name)
    with torch.no_grad():
        both = net.encode(images, mask_of(net, net.modalities, net.modalities))
        one = net.encode(images, mask_of(net, net.modalities, without))
    for level, latents in both.levels.items():
        if moved(latents[name][:1], one.levels[level][name][:1]):
            return f"train mode: latents {level} of {name} move when another sample lacks {name}: its place is counted"
    return ""


def _samples(trial: Trial) -> str:
    net = trial.network()
    ordinary = trial.images(net, 2)
    images = trial.wild(ordinary, net.modalities, slice(1, 2))
    subsets = net.supported_subsets()
    for subset, neighbour in zip(subsets, [*subsets[1:], subsets[0]], strict=True):
        seen, kept = mask_of(net, subset, net.modalities), mask_of(net, subset, neighbour)
        together = trial.logits(net, images, seen, kept)
        for row, which in enumerate((subset, neighbour)):
            alone = trial.logits(net, {n: x[[row]] for n, x in images.items()}, seen[[row]], kept[[row]])
            fault = moved(alone, together[[row]])
            if fault:
                return f"logits of a sample with {which}, alone and beside one with other sequences, {fault}"
    return ""


def _deterministic(trial: Trial) -> str:
    net = trial.network()
    images, mask = trial.images(net), mask_of(net, net.supported_subsets()[-1])
    again = replace(trial, seed=trial.seed + 1)
    fault = moved(trial.logits(net, images, mask, mask), again.logits(net, images, mask, mask))
    return f"eval mode: logits of one image, computed twice, {fault}; is a dropout or a sampling on?" if fault else ""


def _saving(trial: Trial) -> str:
    net, other = trial.network(), trial.network(shift=1)
    images = trial.images(net, 2)
    with torch.no_grad():
        list(trial.answers(net.train(), images))  # what passes in training leave behind must be saved too
        other.load_state_dict(load(save({name: t.contiguous() for name, t in net.state_dict().items()})))
        before, after = trial.answers(net.eval(), images), trial.answers(other, images)
        for (subset, a), (_, b) in zip(before, after, strict=True):
            fault = moved(a.logits, b.logits)
            if fault:
                return f"{subset}: logits before saving and after loading {fault}; register what is missing as a buffer"
    return ""


def _strides(trial: Trial) -> str:
    net = trial.network()
    size = trial.even(net)
    full, partial = net.modalities, net.supported_subsets()[0]
    with torch.no_grad():
        encoded = net.encode(trial.images(net, 2), mask_of(net, full, partial))
    for level, stride in net.strides.items():
        latents = encoded.levels.get(level, {})
        for name in answering(net):
            expected = tuple(n // stride for n in size)
            found = tuple(latents[name].shape[2:]) if name in latents else None
            if found != expected:
                return (
                    f"level {level} (stride {stride}) of {name} is {found} for an image of {size}; expected {expected}"
                )
            if name not in partial and latents[name][1].any():
                return f"level {level} of {name} is not 0 in a sample in which {name} is not seen"
    return ""


def _separable(trial: Trial) -> str:
    net = trial.network()
    if not net.separable:
        return ""
    images = trial.images(net)
    with torch.no_grad():
        together = net.encode(images, mask_of(net, net.modalities))
        if together.context is not None:
            return f"declared separable, and encode hands on a context ({type(together.context).__name__})"
        for name in answering(net):
            alone = net.encode({name: images[name]}, mask_of(net, net.modalities.pick([name])))
            for level, latents in together.levels.items():
                fault = moved(alone.levels[level][name], latents[name])
                if fault:
                    return f"declared separable, and latents {level} of {name} alone and among all {fault}"
    return ""


def _digests(trial: Trial) -> str:
    net = trial.network()
    if not hasattr(net, "digest"):
        return ""
    with torch.no_grad():
        encoded = net.encode(trial.images(net), mask_of(net, net.modalities))
        digests = {
            level: {n: net.digest(level, n, z) for n, z in each.items()} for level, each in encoded.levels.items()
        }
        ready = replace(encoded, levels={}, digests=digests)
        for subset in net.supported_subsets():
            mask = mask_of(net, subset)
            fault = moved(net.decode(encoded, mask).logits, net.decode(ready, mask).logits)
            if fault:
                return f"{subset}: logits from latents and from their digests {fault}"
    return ""


LAWS: dict[str, tuple[str, Callable[[Trial], str]]] = {
    "members": ("a torch module with the members of Backbone", _members),
    "shape": ("logits [B K X Y Z] in the size of the image, odd or even", _shape),
    "finite": ("logits, losses and gradients are finite, also for constant images", _finite),
    "gradients": ("every parameter gets a gradient from some subset", _gradients),
    "leakage": ("what is not kept cannot move the logits, and might as well be removed", _leakage),
    "statistics": ("what is not seen enters no statistics of a training batch", _statistics),
    "samples": ("samples of a batch do not influence each other in eval mode", _samples),
    "deterministic": ("the same image gives the same logits in eval mode", _deterministic),
    "saving": ("a fresh network with the saved state gives the same logits", _saving),
    "strides": ("latents have the declared strides, and are 0 where the sequence is not seen", _strides),
    "separable": ("if declared separable: a sequence encodes alone as it does among others", _separable),
    "digests": ("if it digests latents: the same logits from the digests alone", _digests),
}
