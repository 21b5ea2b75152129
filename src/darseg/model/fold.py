"""BatchNorm folded into the convolutions before it: the same logits but for rounding, with fewer passes over memory."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from darseg.model.heads import ConvNormReLU
from darseg.model.network import Network


def fold_batchnorm(network: Network) -> Network:
    """Fold every BatchNorm that follows a convolution, and nothing else does, into it; in place.

    In eval mode a BatchNorm multiplies each channel by a constant and adds one, which the convolution's weights can do
    as well. For predicting only: what is left cannot be trained or saved. Backbones whose path depends on the
    image's size cannot be followed; those, and other normalisations, stay as they are.

    Args:
        network: in eval mode.

    Returns:
        the same network.
    """
    for norm_relu in [module for module in network.modules() if isinstance(module, ConvNormReLU)]:
        _fold(norm_relu, "conv", "norm")
    for conv, norm in _pairs(network.backbone):
        _fold(network.backbone, conv, norm)
    return network


class _Tracer(fx.Tracer):
    """Follows values from module to module; does not look into convolutions and normalisations, timm's included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(m, module_qualified_name)


def _pairs(backbone: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions whose output goes into a BatchNorm and nowhere else, and of that BatchNorm."""
    try:
        graph = _Tracer().trace(backbone)
    except Exception:  # networks of others refuse in many ways
        return []
    modules = dict(backbone.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if (
            isinstance(before, fx.Node)
            and before.op == "call_module"
            and isinstance(modules[before.target], nn.Conv2d)
            and len(before.users) == calls[before.target] == calls[node.target] == 1
        ):
            found.append((before.target, node.target))
    return found


def _fold(module: nn.Module, conv: str, norm: str) -> None:
    old = module.get_submodule(norm)
    if type(old) is nn.BatchNorm2d:
        rest: nn.Module = nn.Identity()
    elif isinstance(drop := getattr(old, "drop", None), nn.Module) and isinstance(old.act, nn.Module):
        rest = nn.Sequential(drop, old.act)  # timm's BatchNorm goes on with these
    else:
        return
    folded = fuse_conv_bn_eval(module.get_submodule(conv), old)  # ty: ignore[invalid-argument-type]
    for name, new in ((conv, folded), (norm, rest.eval())):
        above, _, last = name.rpartition(".")
        setattr(module.get_submodule(above), last, new)
