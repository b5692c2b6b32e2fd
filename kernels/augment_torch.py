"""Augmented views in plain PyTorch, on any device with float64: Pillow's bytes, as those of csrc/augment.cpp.

Legend
  n  images      H, W  sides of an image      C  its channels, 3 or 4      S  side of a view in pixels
  m  views       h     height of the highest crop of a block               K  taps of a resize, the most of any pixel
  b  views of a block, or those of them that an operation is for

Nothing loops over views, but over blocks of them, which bound the memory: on a GPU a block is nearly always all there
are; on a CPU it is what the caches hold, which takes two thirds of the time.  An operation gets those views that have
it, as bytes [b, 3, S, S], and their rows of the table (augment_table.py).

Numbers are whole or rounded once, as in csrc.  For that no product is fused with a sum (as `addcmul` and `lerp` may),
sums of weights go in order, and divisors are tensors: CUDA multiplies by the inverse of a plain number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.augment_table import BLUR_PASSES, BOX_BITS, Column, Flag

WEIGHT_BITS = 22  # of the weights of a resize, after the point
BLOCK_PIXELS = {"cpu": 1 << 18}  # of a block's images or views, whichever are larger
BLOCK_PIXELS_ELSEWHERE = 1 << 24

Operation = Callable[[Tensor, Tensor], Tensor]  # bytes [b, 3, S, S] and table [b, WIDTH] to bytes


def views(images: Tensor, table: Tensor, *, size: int) -> Tensor:
    """All views of a table, uint8 [m, S, S, 3].

    images   uint8 [n, H, W, C]; a fourth channel is not read
    table    int32 [m, WIDTH] of augment_table.table_of, on the same device
    size     S
    """
    m, (_, H, W, _) = len(table), images.shape
    images = images.contiguous()
    block = max(BLOCK_PIXELS.get(images.device.type, BLOCK_PIXELS_ELSEWHERE) // max(size * size, H * W), 1)
    out = images.new_empty((m, size, size, 3))
    for i in range(0, m, block):
        out[i : i + block] = _made(images, table[i : i + block], size).permute(0, 2, 3, 1)
    return out


def _made(images: Tensor, table: Tensor, size: int) -> Tensor:
    """Views of one block, [b, 3, S, S]."""
    pixels = _resized(images, table, size)
    flags = table[:, Column.FLAGS]
    jittered = (flags & Flag.JITTER) != 0
    for slot in range(4):
        operation = (table[:, Column.ORDER] >> 2 * slot) & 3
        for i, jitter in enumerate((_brightened, _contrasted, _saturated, _turned_in_hue)):
            _apply(jitter, pixels, table, jittered & (operation == i))
    _apply(_grey, pixels, table, (flags & Flag.GRAYSCALE) != 0)
    _apply(_blurred, pixels, table, table[:, Column.RADIUS] >= 0)
    _apply(_solarized, pixels, table, (flags & Flag.SOLARIZE) != 0)
    return pixels


def _apply(operation: Operation, pixels: Tensor, table: Tensor, which: Tensor) -> None:
    """Changes those views for which `which` [b] is true."""
    chosen = which.nonzero()[:, 0]
    if len(chosen):
        pixels.index_copy_(0, chosen, operation(pixels[chosen], table[chosen]))


# -- resize


def _resized(images: Tensor, table: Tensor, size: int) -> Tensor:
    """Crops of images, resized and flipped, [b, 3, S, S]."""
    width, height = table[:, Column.CROP_WIDTH], table[:, Column.CROP_HEIGHT]
    columns_first = (height > size) & (height - size > 2 * (width - size))  # as Pillow 13
    pixels = images.new_empty((len(table), 3, size, size))
    for which, resize in ((columns_first, _columns_first), (~columns_first, _rows_first)):
        chosen = which.nonzero()[:, 0]
        if len(chosen):
            pixels.index_copy_(0, chosen, resize(images, table[chosen], size))
    return pixels


def _rows_first(images: Tensor, table: Tensor, size: int) -> Tensor:
    _, H, W, C = images.shape
    b, h = len(table), int(table[:, Column.CROP_HEIGHT].max())
    rows = images.view(-1, W * C)
    inside = _first_row(table, H) + torch.arange(h, device=table.device)  # [b, h]; past a crop: rows that weigh nothing
    crops = rows.index_select(0, inside.clamp(max=len(rows) - 1).flatten())
    middle = _weighed(_turned(crops.view(b, h, W, C)), *_across(table, W, size))  # [b, S, 3 h]
    first, weights = _taps(table[:, Column.CROP_HEIGHT], size)
    pixels = _weighed(_turned(middle.view(b, size, 3, h).transpose(2, 3)), _own_rows(table, h) + first, weights)
    return pixels.view(b, size, 3, size).transpose(1, 2)


def _columns_first(images: Tensor, table: Tensor, size: int) -> Tensor:
    _, H, W, C = images.shape
    first, weights = _taps(table[:, Column.CROP_HEIGHT], size)
    middle = _weighed(images.view(-1, W * C), _first_row(table, H) + first, weights)  # [b, S, W C]
    pixels = _weighed(_turned(middle.view(-1, size, W, C)), *_across(table, W, size))
    return pixels.view(-1, size, 3, size).permute(0, 2, 3, 1)


def _turned(pixels: Tensor) -> Tensor:
    """[b, y, x, C] as rows [b x, 3 y]: what works on whole rows then works along x, and most of it is contiguous."""
    b, y, x, _ = pixels.shape
    return pixels[..., :3].permute(0, 2, 3, 1).reshape(b * x, 3 * y)


def _first_row(table: Tensor, H: int) -> Tensor:
    """[b, 1]: where a crop begins among the rows of all images."""
    return (table[:, Column.SOURCE].long() * H + table[:, Column.TOP])[:, None]


def _own_rows(table: Tensor, rows: int) -> Tensor:
    """[b, 1]: where a view begins among rows that belong to one view each."""
    return torch.arange(0, len(table) * rows, rows, device=table.device)[:, None]


def _across(table: Tensor, W: int, size: int) -> tuple[Tensor, Tensor]:
    """Of columns of the views' own images: which is each pixel's first [b, S], and weights [K, b, S]."""
    first, weights = _taps(table[:, Column.CROP_WIDTH], size)
    flip = (table[:, Column.FLAGS, None] & Flag.FLIP) != 0
    first, weights = (torch.where(flip, values.flip(-1), values) for values in (first, weights))
    return _own_rows(table, W) + table[:, Column.LEFT, None] + first, weights


def _taps(length: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Which source pixels each of S is made of, for axes of `length` [b]: the first [b, S], and weights [K, b, S].

    A triangle about its centre, as wide as the step between centres, at least one pixel to either side.
    """
    ended = length[:, None].long()
    step = ended.double() / torch.full((), size, dtype=torch.float64, device=length.device)
    reach = step.clamp(min=1)
    center = (torch.arange(size, dtype=torch.float64, device=length.device) + 0.5) * step
    first = (center - reach + 0.5).long().clamp(min=0)
    end = torch.minimum((center + reach + 0.5).long(), ended)
    taps = int((end - first).max())
    source = first + torch.arange(taps, device=length.device)[:, None, None]  # [K, b, S]
    distance = (source - center + 0.5) * reach.reciprocal()
    exact = (1 - distance.abs()).clamp(min=0) * (source < end)
    total = torch.zeros_like(center)
    for weight in exact:
        total += weight
    return first, (exact / total * (1 << WEIGHT_BITS) + 0.5).int()


def _weighed(rows: Tensor, first: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows [.., L] from `first` [b, S] on, [b, S, L]."""
    sums = torch.full((first.numel(), rows.shape[1]), 1 << (WEIGHT_BITS - 1), dtype=torch.int32, device=rows.device)
    for k, weight in enumerate(weights):
        chosen = (first + k).clamp(max=len(rows) - 1)  # past the last: what weighs nothing
        sums += rows.index_select(0, chosen.flatten()) * weight.reshape(-1, 1)
    # Of thousands of weights, each rounded, white may come out a level too high.
    return (sums >> WEIGHT_BITS).clamp(max=255).to(torch.uint8).view(*first.shape, -1)


# -- colours


def _brightened(pixels: Tensor, table: Tensor) -> Tensor:
    return _blended(pixels, 0, _factor(table, Column.BRIGHTNESS))


def _contrasted(pixels: Tensor, table: Tensor) -> Tensor:
    area = pixels[0, 0].numel()
    total = _luminance(pixels).sum(dim=(1, 2, 3), keepdim=True)
    mean = (2 * total + area) // (2 * area)  # halves upwards
    return _blended(pixels, mean.float(), _factor(table, Column.CONTRAST))


def _saturated(pixels: Tensor, table: Tensor) -> Tensor:
    return _blended(pixels, _luminance(pixels).float(), _factor(table, Column.SATURATION))


def _grey(pixels: Tensor, table: Tensor) -> Tensor:
    return _luminance(pixels).to(torch.uint8).expand_as(pixels)


def _solarized(pixels: Tensor, table: Tensor) -> Tensor:
    return torch.where(pixels < 128, pixels, 255 - pixels)


def _turned_in_hue(pixels: Tensor, table: Tensor) -> Tensor:
    """To hue, saturation and value in bytes, and back, by the formulas of pixels_kernels.inl."""
    r, g, b = pixels.float().unbind(1)
    value = torch.maximum(r, torch.maximum(g, b))
    spread = value - torch.minimum(r, torch.minimum(g, b))
    sixth = _sixths(r, g, b, value, spread) / value.new_full((), 6)
    steps = ((sixth + (sixth < 0)) * 255).int()
    saturation = (255 * spread / value.clamp(min=1)).floor()
    turned = 6 * ((steps + table[:, Column.HUE, None, None]) & 255)
    step = value * saturation * (1 / 65025)  # of 255 of a channel's share
    shares = (
        torch.minimum(turned - 255, 1275 - turned),
        torch.maximum(255 - turned, turned - 765),
        torch.maximum(765 - turned, turned - 1275),
    )
    share = torch.stack(shares, dim=1).clamp(0, 255)
    return ((value + 0.5)[:, None] - step[:, None] * share).to(torch.uint8)


def _sixths(r: Tensor, g: Tensor, b: Tensor, value: Tensor, spread: Tensor) -> Tensor:
    """Hues in sixths of a turn: whole ones by which channel is largest, the rest by where the middle one stands."""
    red, green = r == value, g == value
    ahead = torch.where(red, g - b, torch.where(green, b - r, r - g))
    base = (~red).float() * (4 - 2 * green.float())
    sign = 1 - 2 * (ahead < 0).float()
    middle = (spread - ahead.abs()) / spread.clamp(min=1)
    return base + sign - sign * middle


def _blended(pixels: Tensor, low: Tensor | int, factor: Tensor) -> Tensor:
    return (low + factor * (pixels.float() - low)).clamp(0, 255).to(torch.uint8)


def _factor(table: Tensor, column: Column) -> Tensor:
    return table[:, column, None, None, None].view(torch.float32)


def _luminance(pixels: Tensor) -> Tensor:
    """[b, 1, S, S], whole numbers."""
    r, g, b = pixels.int().split(1, dim=1)
    return (19595 * r + 38470 * g + 7471 * b + 32768) >> 16


# -- blur


def _blurred(pixels: Tensor, table: Tensor) -> Tensor:
    """Passes of a box along rows, then along columns, with bytes after each.

    Sums of pixels are differences of sums from the first pixel on; pixels outside are the outermost ones, so those sums
    go on beyond them in a straight line.
    """
    S = pixels.shape[-1]
    radius = table[:, Column.RADIUS, None]
    inside, edge = (table[:, column, None, None, None] for column in (Column.INSIDE, Column.EDGE))
    place = torch.arange(S + 1, dtype=torch.int32, device=pixels.device)
    # Q(j) is the sum up to pixel j.  `low` holds Q(y - radius - 2) and `high` Q(y + radius) of y from 0 to S: one place
    # further on is what the box needs one pixel further out.
    until = torch.cat((place - radius - 2, place + radius), dim=1)[:, None, None]
    nearest = until.clamp(0, S - 1).long().expand(-1, 3, S, -1)
    before, after = until.clamp(max=0), (until - (S - 1)).clamp(min=0)
    for _ in range(2):
        for _ in range(BLUR_PASSES):
            sums = pixels.cumsum(-1, dtype=torch.int32).gather(-1, nearest)
            sums += pixels[..., :1] * before
            sums += pixels[..., -1:] * after
            low, high = sums.split(S + 1, dim=-1)
            narrow, wide = high[..., :-1] - low[..., 1:], high[..., 1:] - low[..., :-1]
            # Below 2^32, of which int32 keeps all bits; the uppermost ones are the byte.
            weighed = narrow * (inside - edge) + wide * edge + (1 << (BOX_BITS - 1))
            pixels = ((weighed >> BOX_BITS) & 255).to(torch.uint8)
        pixels = pixels.transpose(2, 3)
    return pixels
