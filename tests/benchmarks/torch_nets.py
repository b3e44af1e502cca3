"""The layers of ResUNet30 and Cnn14 in PyTorch, to measure against.

Parameter names are those of the published checkpoints, so that `load_state_dict` takes them. Maps
are [b, c, n, f]. Where the reference computes its Fourier transforms as convolutions with DFT
kernels, these nets call `torch.stft`, which is faster: the comparison is with PyTorch at its best.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tests.golden.weights import mel_matrix

ENCODER_WIDTHS = (32, 64, 128, 256, 384, 384)


def stft(waveform: Tensor, n_fft: int, hop: int) -> Tensor:
    """Complex [..., n, f] of [..., t]: periodic Hann window, centred, reflect padding."""
    flat = waveform.reshape(-1, waveform.shape[-1])
    window = torch.hann_window(n_fft, dtype=waveform.dtype)
    spectrum = torch.stft(flat, n_fft, hop, window=window, return_complex=True, pad_mode="reflect")
    return spectrum.transpose(1, 2).reshape(*waveform.shape[:-1], -1, n_fft // 2 + 1)


def istft(spectrum: Tensor, n_fft: int, hop: int, length: int) -> Tensor:
    """The inverse of `stft`."""
    flat = spectrum.reshape(-1, *spectrum.shape[-2:]).transpose(1, 2)
    waveform = torch.istft(flat, n_fft, hop, window=torch.hann_window(n_fft), length=length)
    return waveform.reshape(*spectrum.shape[:-2], length)


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """With the reference's momentum."""
    return nn.BatchNorm2d(channels, momentum=0.01)


class ResidualBlock(nn.Module):
    """Norm, FiLM, leaky ReLU and 3x3 convolution, twice, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.bn1, self.bn2 = batch_norm(inputs), batch_norm(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, shift: dict[str, Tensor], name: str) -> Tensor:
        y = self.conv1(F.leaky_relu_(self.bn1(x) + shift[f"{name}->beta1"]))
        y = self.conv2(F.leaky_relu_(self.bn2(y) + shift[f"{name}->beta2"]))
        return self.shortcut(x) + y


class Encoder(nn.Module):
    """One residual block."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv_block1 = ResidualBlock(inputs, outputs)

    def forward(self, x: Tensor, shift: dict[str, Tensor], name: str) -> Tensor:
        return self.conv_block1(x, shift, f"{name}->conv_block1")


class Decoder(nn.Module):
    """Norm, FiLM and transposed convolution, then a residual block with the skip connection."""

    def __init__(self, inputs: int, outputs: int, stride: tuple[int, int]):
        super().__init__()
        self.bn1 = batch_norm(inputs)
        self.conv1 = nn.ConvTranspose2d(inputs, outputs, stride, stride, bias=False)
        self.conv_block2 = ResidualBlock(2 * outputs, outputs)

    def forward(self, x: Tensor, skip: Tensor, shift: dict[str, Tensor], name: str) -> Tensor:
        x = self.conv1(F.leaky_relu_(self.bn1(x) + shift[f"{name}->beta1"]))
        return self.conv_block2(torch.cat([x, skip], 1), shift, f"{name}->conv_block2")


class Base(nn.Module):
    """The U-Net between two Fourier transforms."""

    def __init__(self, channels: int):
        super().__init__()
        widths = ENCODER_WIDTHS
        self.bn0 = batch_norm(1025)
        self.pre_conv = nn.Conv2d(channels, widths[0], 1)
        for i, (inputs, outputs) in enumerate(zip(widths[:1] + widths, widths, strict=False), 1):
            self.add_module(f"encoder_block{i}", Encoder(inputs, outputs))
        self.conv_block7a = Encoder(widths[-1], widths[-1])
        for i, outputs in enumerate(widths[::-1], 1):
            inputs = widths[-1] if i == 1 else widths[1 - i]
            self.add_module(
                f"decoder_block{i}", Decoder(inputs, outputs, (1, 2) if i == 1 else (2, 2))
            )
        self.after_conv = nn.Conv2d(widths[0], 3 * channels, 1)

    def forward(self, mixture: Tensor, shift: dict[str, Tensor]) -> Tensor:
        spectrum = stft(mixture, 2048, 320)
        magnitude = (spectrum.real**2 + spectrum.imag**2).clamp(1e-10, torch.inf) ** 0.5
        x = self.bn0(magnitude.transpose(1, 3)).transpose(1, 3)
        frames = x.shape[2]
        x = F.pad(x, (0, 0, 0, -frames % 32))[..., :-1]
        x = self.after_conv(self.unet(self.pre_conv(x), shift))
        x = F.pad(x, (0, 1))[:, :, :frames]
        x = x.reshape(x.shape[0], mixture.shape[1], 3, *x.shape[2:])
        return istft(self.masked(spectrum, magnitude, x), 2048, 320, mixture.shape[-1])

    def unet(self, x: Tensor, shift: dict[str, Tensor]) -> Tensor:
        skips = []
        for i in range(1, 7):
            name = f"encoder_block{i}"
            x = getattr(self, name)(x, shift, name)
            skips.append(x)
            x = F.avg_pool2d(x, (1, 2) if i == 6 else (2, 2))
        x = self.conv_block7a(x, shift, "conv_block7a")
        for i in range(1, 7):
            name = f"decoder_block{i}"
            x = getattr(self, name)(x, skips.pop(), shift, name)
        return x

    @staticmethod
    def masked(spectrum: Tensor, magnitude: Tensor, x: Tensor) -> Tensor:
        """The spectrum with its magnitude scaled and its phase turned by the maps x."""
        scale, real, imag = (
            torch.sigmoid(x[:, :, 0]),
            torch.tanh(x[:, :, 1]),
            torch.tanh(x[:, :, 2]),
        )
        norm = torch.sqrt(real**2 + imag**2).clamp(1e-10, torch.inf)
        turned_cos, turned_sin = real / norm, imag / norm
        cos, sin = spectrum.real / magnitude, spectrum.imag / magnitude
        out = F.relu(magnitude * scale)
        return torch.complex(
            out * (cos * turned_cos - sin * turned_sin), out * (sin * turned_cos + cos * turned_sin)
        )


class ResUNet30(nn.Module):
    """The published separator: mixture [b, c, t] and condition [b, d] to estimate [b, c, t]."""

    def __init__(self, channels: int = 1, condition_width: int = 527):
        super().__init__()
        self.base = Base(channels)
        self.film = nn.Module()
        for path, module in self.base.named_modules():
            names = path.split(".")
            if isinstance(module, nn.BatchNorm2d) and path != "bn0":
                names[-1] = names[-1].replace("bn", "beta")
                layer = nn.Linear(condition_width, module.num_features)
                self.film.add_module("->".join(names), layer)

    def forward(self, mixture: Tensor, condition: Tensor) -> Tensor:
        shift = {n: film(condition)[:, :, None, None] for n, film in self.film.named_children()}
        return self.base(mixture, shift)


class TaggerBlock(nn.Module):
    """3x3 convolution, norm and ReLU, twice."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu_(self.bn2(self.conv2(F.relu_(self.bn1(self.conv1(x))))))


class LogMel(nn.Module):
    """The front end of both tagging nets and the norm behind it: [b, t] to [b, 1, n, m]."""

    def __init__(
        self,
        sample_rate: int = 32000,
        n_fft: int = 1024,
        hop_samples: int = 320,
        mel_bins: int = 64,
        f_min: float = 50.0,
        f_max: float = 14000.0,
    ):
        super().__init__()
        self.n_fft, self.hop_samples = n_fft, hop_samples
        self.mel = torch.from_numpy(mel_matrix(sample_rate, n_fft, mel_bins, f_min, f_max))
        # The published nets have a BatchNorm2d over [b, m, n, 1]. Where the layouts of that map and
        # of its gradient differ, PyTorch 2.13 returns wrong gradients of weight and bias on a CPU.
        self.bn0 = nn.BatchNorm1d(mel_bins)

    def log_mel(self, waveform: Tensor) -> Tensor:
        spectrum = stft(waveform, self.n_fft, self.hop_samples)
        power = spectrum.real**2 + spectrum.imag**2
        mel = power @ self.mel.to(power.dtype)
        x = 10 * torch.log10(torch.clamp(mel, min=1e-10))
        return self.bn0(x.transpose(1, 2)).transpose(1, 2)[:, None]


class Cnn14(LogMel):
    """The published tagging net: waveform [b, t] to probabilities [b, 527], embedding [b, 2048]."""

    def __init__(
        self,
        channels: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048),
        classes: int = 527,
        **front_end: float,
    ):
        super().__init__(**front_end)
        self.blocks = range(1, len(channels) + 1)
        for i, inputs, outputs in zip(self.blocks, (1, *channels), channels, strict=False):
            self.add_module(f"conv_block{i}", TaggerBlock(inputs, outputs))
        self.fc1 = nn.Linear(channels[-1], channels[-1])
        self.fc_audioset = nn.Linear(channels[-1], classes)

    def dropout(self, x: Tensor, rate: float) -> Tensor:
        """Of channels (axis 1) or, of [b, e], features; off here."""
        return x

    def features(self, waveform: Tensor) -> Tensor:
        """[b, e, s]."""
        x = self.log_mel(waveform)
        for i in self.blocks:
            x = getattr(self, f"conv_block{i}")(x)
            x = F.avg_pool2d(x, 2) if i < len(self.blocks) else x
            x = self.dropout(x, 0.2)
        return x.mean(3)

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(waveform)
        embedding = F.relu(self.fc1(self.dropout(x.amax(2) + x.mean(2), 0.5)))
        return torch.sigmoid(self.fc_audioset(embedding)), embedding


class Cnn14DecisionLevelMax(Cnn14):
    """The published detector: waveform [b, t] to clipwise [b, k] and segmentwise [b, s, k]."""

    def forward(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        x = self.features(waveform)
        x = F.max_pool1d(x, 3, 1, 1) + F.avg_pool1d(x, 3, 1, 1)
        x = self.dropout(x, 0.5).transpose(1, 2)
        x = self.dropout(F.relu(self.fc1(x)).transpose(1, 2), 0.5).transpose(1, 2)
        segmentwise = torch.sigmoid(self.fc_audioset(x))
        return segmentwise.amax(1), segmentwise


def load(net: nn.Module, state_dict: dict) -> nn.Module:
    """Fills a net from numpy arrays, passing over tensors that no forward pass uses."""
    tensors = {name: torch.from_numpy(array) for name, array in state_dict.items()}
    missing, _ = net.load_state_dict(tensors, strict=False)
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}")
    return net.eval()
