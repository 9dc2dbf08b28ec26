"""A small drawing vocabulary over Pillow: bold antialiased shapes on a transparent square of 100 × 100 units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw

UNITS = 100
"""The side of the drawing in units; y grows downwards."""

Point = tuple[float, float]
Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]


class Pen:
    """Draws on a transparent RGBA square of `side` pixels; every coordinate and length is in units."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
        self._draw = ImageDraw.Draw(self.image)

    def _pixels(self, lengths: Sequence[float]) -> list[float]:
        return [length * self.side / UNITS for length in lengths]

    def ellipse(self, center: Point, radius: float, colour: Colour, radius_y: float | None = None) -> None:
        """A filled circle, or an ellipse when `radius_y` is given."""
        x, y = center
        ry = radius if radius_y is None else radius_y
        self._draw.ellipse(self._pixels((x - radius, y - ry, x + radius, y + ry)), fill=colour)

    def block(self, box: Box, corner: float, colour: Colour) -> None:
        """A filled rectangle (left, top, right, bottom) with rounded corners of radius `corner`."""
        self._draw.rounded_rectangle(self._pixels(box), radius=corner * self.side / UNITS, fill=colour)

    def polygon(self, corners: Sequence[Point], colour: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([tuple(self._pixels(corner)) for corner in corners], fill=colour)

    def stroke(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """A line through `points` with round joints and round ends."""
        path = [tuple(self._pixels(point)) for point in points]
        self._draw.line(path, fill=colour, width=round(width * self.side / UNITS), joint="curve")
        for point in points:
            self.ellipse(point, width / 2, colour)

    def ring(self, center: Point, radius: float, width: float, colour: Colour, arc: tuple[float, float]) -> None:
        """Part of a circle drawn `width` thick, from arc[0] to arc[1] degrees clockwise from three o'clock."""
        x, y = center
        outer = radius + width / 2
        box = self._pixels((x - outer, y - outer, x + outer, y + outer))
        self._draw.arc(box, arc[0], arc[1], fill=colour, width=round(width * self.side / UNITS))

    def filled_with(self, shape: Callable[[Pen], None], pattern: Callable[[Pen], None]) -> None:
        """Draw `pattern`, but only inside the outline that `shape` draws."""
        stencil, layer = Pen(self.side), Pen(self.side)
        shape(stencil)
        pattern(layer)
        inside = Image.composite(layer.image, Image.new("RGBA", layer.image.size), stencil.image.getchannel("A"))
        self.image.alpha_composite(inside)
