"""HTS-AT in PyTorch, written from the paper (arXiv:2202.00874), to hold its training to.

Parameter names are those of the published checkpoints. Clips fill the image exactly: nothing is
stretched or cut. Tokens are [b, y * x, c].
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.benchmarks.torch_nets import LogMel
from tests.golden.weights import relative_index, shift_mask

PATCH, WINDOW = 4, 8


def windows_of(x: Tensor, window: int) -> Tensor:
    """[b, y, x, c] to [b * windows, tokens, c]."""
    b, height, width, c = x.shape
    x = x.view(b, height // window, window, width // window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, c)


def grid_of(windows: Tensor, window: int, side: int) -> Tensor:
    """The inverse for a square grid."""
    along, c = side // window, windows.shape[-1]
    x = windows.view(-1, along, along, window, window, c)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, side, c)


class Attention(nn.Module):
    """Within windows [w, p, c], with a bias by relative position."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        rows = (2 * window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, heads))
        self.index = torch.from_numpy(relative_index(window)).long()

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        w, p, c = x.shape
        q, k, v = self.qkv(x).view(w, p, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        logits = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        logits = logits + self.relative_position_bias_table[self.index].permute(2, 0, 1)
        if mask is not None:
            items = w // len(mask)
            logits = logits + mask.to(x.dtype).repeat(items, 1, 1)[:, None]
        y = torch.softmax(logits, -1) @ v
        return self.proj(y.transpose(1, 2).reshape(w, p, c))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, side: int, shifted: bool):
        super().__init__()
        self.side, self.window = side, min(WINDOW, side)
        self.shift = WINDOW // 2 if shifted and side > WINDOW else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.mlp = Attention(width, heads, self.window), Mlp(width)
        self.mask = None
        if self.shift:
            self.mask = torch.from_numpy(shift_mask(side, side, self.window, self.shift))

    def forward(self, x: Tensor) -> Tensor:
        grid = self.norm1(x).view(-1, self.side, self.side, x.shape[-1])
        grid = torch.roll(grid, (-self.shift, -self.shift), (1, 2))
        attended = self.attn(windows_of(grid, self.window), self.mask)
        grid = torch.roll(grid_of(attended, self.window, self.side), (self.shift,) * 2, (1, 2))
        x = x + grid.flatten(1, 2)
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    def __init__(self, width: int, side: int):
        super().__init__()
        self.side = side
        self.norm = nn.LayerNorm(4 * width)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, self.side, self.side, x.shape[-1])
        corners = [x[:, down::2, right::2] for right in (0, 1) for down in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1).flatten(1, 2)))


class Stage(nn.Module):
    def __init__(self, width: int, heads: int, depth: int, side: int, merges: bool):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, side, j % 2 == 1) for j in range(depth))
        self.downsample = Merge(width, side) if merges else None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class Patches(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.proj, self.norm = nn.Conv2d(1, width, PATCH, PATCH), nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm(self.proj(image).flatten(2).transpose(1, 2))


class HTSAT(LogMel):
    """Waveform [b, t] to probabilities [b, k] and embedding [b, e]."""

    def __init__(
        self,
        image_size: int = 256,
        token_width: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (4, 8, 16, 32),
        classes: int = 527,
        mel_bins: int = 64,
        **front_end: float,
    ):
        super().__init__(mel_bins=mel_bins, **front_end)
        self.image_size, self.folds = image_size, image_size // mel_bins
        self.patch_embed = Patches(token_width)
        sides = [image_size // PATCH // 2**i for i in range(len(depths))]
        self.layers = nn.ModuleList(
            Stage(token_width * 2**i, heads[i], depths[i], sides[i], i < len(depths) - 1)
            for i in range(len(depths))
        )
        self.side = sides[-1]
        width = token_width * 2 ** (len(depths) - 1)
        self.norm = nn.LayerNorm(width)
        self.bands = self.side // self.folds
        self.tscam_conv = nn.Conv2d(width, classes, (self.bands, 3), padding=(0, 1))

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        x = self.log_mel(waveform)  # [b, 1, n, m]
        b, _, _, mel_bins = x.shape
        x = x.transpose(2, 3).reshape(b, mel_bins, self.folds, self.image_size)
        x = self.patch_embed(x.transpose(1, 2).reshape(b, 1, self.image_size, self.image_size))
        for layer in self.layers:
            x = layer(x)
        x = self.norm(x)
        embedding = x.mean(1)
        x = x.transpose(1, 2).reshape(b, -1, self.folds, self.bands, self.side)
        x = x.transpose(2, 3).reshape(b, -1, self.bands, self.folds * self.side)
        return torch.sigmoid(self.tscam_conv(x).flatten(2).mean(2)), embedding
