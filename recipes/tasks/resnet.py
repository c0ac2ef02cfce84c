"""ResNet for CIFAR (He et al., "Deep Residual Learning for Image Recognition", section 4.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_outputs import ImageClassifierOutput

from recipes.support import inputs


class Block(nn.Module):
    """Two 3x3 convolutions; a shortcut without parameters, which drops pixels and adds channels of zeros (option A)."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        stride = 1 if channels_in == channels else 2
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.added = channels - channels_in

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(batch, channels_in, height, width)` to `(batch, channels, ...)`, halved if the channels differ."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The network of depth `6 * blocks + 2`, called as the image classifiers of transformers are.

    Args:
        blocks: how many are in each of the three stages of 16, 32 and 64 channels; 3 for ResNet-20.
        num_labels: how many classes there are.
    """

    def __init__(self, blocks: int = 3, num_labels: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(Block(16 if i == 0 else 32, 32) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(Block(32 if i == 0 else 64, 64) for i in range(blocks)))
        self.linear = nn.Linear(64, num_labels)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None) -> ImageClassifierOutput:
        """Returns logits `(batch, num_labels)` for images of shape `(batch, 3, height, width)`, and the loss."""
        x = F.relu(self.bn1(self.conv1(pixel_values)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits = self.linear(x.mean((2, 3)))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def load_resnet20(file: str, num_labels: int) -> CifarResNet:
    """Loads a pretrained ResNet-20, its head only if that is for as many classes.

    Args:
        file: safetensors file of the weights.
        num_labels: how many classes there are.
    """
    network = CifarResNet(num_labels=num_labels)
    with inputs.loading("network_weights", file):
        weights = load_file(file)
        head = {name: weights.pop(name) for name in list(weights) if name.startswith("linear.")}
        found = network.load_state_dict(weights, strict=False)
        missing = [name for name in found.missing_keys if not name.startswith("linear.")]
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or found.unexpected_keys:
            raise ValueError(f"no ResNet-20: it lacks {missing[:1]}, and has {found.unexpected_keys[:1]} beyond it")
        if all(head[name].shape == value.shape for name, value in network.linear.state_dict(prefix="linear.").items()):
            network.linear.load_state_dict({name.partition(".")[2]: value for name, value in head.items()})
    return network
