"""Five made-up things, none of them among the emoji pictograms, each of a class that the base model `mini` knows.

Every function draws its subject upright in the middle of a `Pen`'s square, in bold shapes and three or four saturated
colours, so that it can still be told apart at 64 × 64 pixels."""

from __future__ import annotations

from tools.subjects.pen import Colour, Pen, Point

INK: Colour = (34, 32, 52)
WHITE: Colour = (255, 255, 255)
CREAM: Colour = (255, 244, 214)
TEAL: Colour = (0, 158, 150)
DEEP_TEAL: Colour = (0, 104, 108)
ORANGE: Colour = (255, 122, 0)
YELLOW: Colour = (255, 204, 26)
BROWN: Colour = (140, 72, 20)
BLUE: Colour = (36, 96, 220)
PURPLE: Colour = (124, 52, 190)
LIME: Colour = (124, 208, 40)
RED: Colour = (222, 40, 52)
TURQUOISE: Colour = (40, 190, 200)
PINK: Colour = (248, 120, 168)
NAVY: Colour = (44, 56, 132)


def eye(pen: Pen, center: Point, radius: float, iris: Colour = INK) -> None:
    """A white eye with a big pupil and a highlight."""
    x, y = center
    pen.ellipse(center, radius, WHITE)
    pen.ellipse(center, radius * 0.58, iris)
    pen.ellipse((x + radius * 0.22, y - radius * 0.24), radius * 0.2, WHITE)


def robot(pen: Pen) -> None:
    """A teal toy robot: one big eye, an orange ball on its antenna, a belly with orange stripes."""
    pen.stroke([(50, 24), (50, 11)], 4.6, DEEP_TEAL)
    pen.ellipse((50, 9.5), 8.5, ORANGE)
    for left in (32, 53):
        pen.block((left, 78, left + 15, 93), 2, DEEP_TEAL)
        pen.block((left - 3, 88, left + 18, 98), 5, ORANGE)
    for hand, shoulder in (((9, 74), (26, 58)), ((91, 74), (74, 58))):
        pen.stroke([shoulder, hand], 9, DEEP_TEAL)
        pen.ellipse(hand, 8, ORANGE)
    pen.block((10, 27, 30, 44), 5, ORANGE)
    pen.block((70, 27, 90, 44), 5, ORANGE)
    pen.block((17, 17, 83, 54), 14, TEAL)
    pen.block((22, 50, 78, 88), 9, TEAL)
    eye(pen, (50, 35.5), 16)
    pen.filled_with(
        lambda shape: shape.block((31, 56, 69, 83), 7, CREAM),
        lambda stripes: [
            stripes.block((30, 50, 70, 85), 0, CREAM),
            *(stripes.block((30, top, 70, top + 9), 0, ORANGE) for top in (56, 74)),
        ],
    )


def mug_cat(pen: Pen) -> None:
    """A yellow mug that is a cat: pointed ears, brown spots, a handle for a tail, a blue band."""
    pen.ring((76, 60), 14, 8, YELLOW, (-120, 120))
    pen.ring((76, 60), 14, 8, BROWN, (-25, 25))
    for outer, inner in (((16, 8), (23, 19)), ((70, 8), (63, 19))):
        middle = 43
        base = (outer[0], 40), (outer[0] + (middle - outer[0]) * 0.78, 30)
        pen.polygon([outer, *base], YELLOW)
        pen.polygon([inner, (inner[0] - 1, 34), (inner[0] + (middle - inner[0]) * 0.5, 31)], PINK)

    def body(shape: Pen) -> None:
        shape.block((14, 28, 74, 95), 17, YELLOW)

    def coat(coat: Pen) -> None:
        coat.block((0, 0, 100, 100), 0, YELLOW)
        coat.ellipse((68, 34), 13, BROWN)
        coat.ellipse((17, 66), 8, BROWN)
        coat.ellipse((66, 71), 7.5, BROWN)
        coat.ellipse((38, 33), 5, BROWN)
        coat.block((10, 79, 80, 88), 0, BLUE)

    pen.filled_with(body, coat)
    for x in (31, 57):
        pen.ellipse((x, 50), 6.2, INK, 8)
        pen.ellipse((x + 2, 47), 2.2, WHITE)
    pen.polygon([(39.5, 60), (48.5, 60), (44, 65.5)], PINK)
    pen.ring((39.5, 66), 4.6, 2, INK, (0, 180))
    pen.ring((48.5, 66), 4.6, 2, INK, (0, 180))


def snail_car(pen: Pen) -> None:
    """A lime snail on two wheels, its shell striped in purple and white, eyes on stalks and a yellow headlight."""
    pen.stroke([(77, 58), (72, 30)], 5.5, LIME)
    pen.stroke([(84, 58), (88, 32)], 5.5, LIME)
    pen.block((6, 60, 93, 80), 10, LIME)
    pen.block((68, 48, 94, 80), 12, LIME)

    def shell(shape: Pen) -> None:
        shape.ellipse((40, 43), 31, PURPLE)

    def stripes(stripes: Pen) -> None:
        stripes.ellipse((40, 43), 31, PURPLE)
        for left in (22, 46):
            stripes.block((left, 5, left + 12, 90), 0, WHITE)
        stripes.ring((40, 43), 29, 5, PURPLE, (0, 360))

    pen.filled_with(shell, stripes)
    for x in (26, 73):
        pen.ellipse((x, 81), 13, INK)
        pen.ellipse((x, 81), 7.5, YELLOW)
    eye(pen, (70, 26), 8.5)
    eye(pen, (88, 27), 8.5)
    pen.ellipse((90, 64), 5, YELLOW)


def teapot_creature(pen: Pen) -> None:
    """A walking teapot, red on its left and turquoise on its right, with two eyes, a grin and a yellow knob."""
    pen.ring((21, 54), 13, 7.5, RED, (60, 300))
    pen.stroke([(72, 66), (86, 56), (92, 36)], 10.5, TURQUOISE)
    pen.block((86, 29, 99, 37), 3, YELLOW)
    for x in (38, 62):
        pen.stroke([(x, 80), (x, 92)], 6, INK)
        pen.block((x - 8, 90, x + 7, 97), 3.5, YELLOW)
    pen.ellipse((50, 13), 6.5, YELLOW)

    def pot(shape: Pen) -> None:
        shape.ellipse((50, 58), 32, RED, 29)
        shape.ellipse((50, 29), 21, RED, 12)

    def halves(halves: Pen) -> None:
        halves.block((0, 0, 50, 100), 0, RED)
        halves.block((50, 0, 100, 100), 0, TURQUOISE)
        halves.stroke([(20, 35), (80, 35)], 3, YELLOW)

    pen.filled_with(pot, halves)
    eye(pen, (37, 54), 11)
    eye(pen, (63, 54), 11)
    pen.filled_with(
        lambda shape: shape.ellipse((50, 69), 16, WHITE, 12),
        lambda grin: [grin.block((30, 70, 70, 85), 0, WHITE)],
    )


def plaid_owl(pen: Pen) -> None:
    """A navy owl with plaid wings in red and yellow, big round eyes and a pale belly."""
    for x in (39, 61):
        pen.block((x - 8, 88, x + 8, 97), 4, ORANGE)
    pen.polygon([(22, 5), (20, 34), (50, 20)], NAVY)
    pen.polygon([(78, 5), (80, 34), (50, 20)], NAVY)
    pen.ellipse((50, 37), 31, NAVY, 26)
    pen.ellipse((50, 64), 30, NAVY, 29)
    pen.ellipse((50, 72), 17, CREAM, 19)

    def plaid(plaid: Pen) -> None:
        plaid.block((0, 0, 100, 100), 0, RED)
        for x in (10, 24, 70, 84):
            plaid.block((x, 0, x + 6, 100), 0, YELLOW)
        for y in (53, 69):
            plaid.block((0, y, 100, y + 6), 0, YELLOW)

    for center in ((19, 65), (81, 65)):
        pen.filled_with(lambda shape, center=center: shape.ellipse(center, 15, RED, 23), plaid)
    for x in (37, 63):
        pen.ellipse((x, 35), 14.5, WHITE)
        pen.ellipse((x, 35), 8, INK)
    pen.polygon([(44, 44), (56, 44), (50, 56)], YELLOW)
