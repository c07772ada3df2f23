"""Sudokus to train on: puzzles with one solution each, on as many lines as you like.

    python puzzles.py DATA [--size 9] [--clues 36] [--train 8000] [--valid 100] [--test 500] [--seed 0]

Writes train.jsonl, valid.jsonl and test.jsonl to the folder DATA; no puzzle is in two of them. The fewer clues, the
harder: of 81 cells 45 are easy and 28 hard; of the 16 of size 4, which suits small models, 10 and 5.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from math import isqrt
from pathlib import Path

Grid = list[int]  # cell after cell, row after row; 0 is an empty one


def solutions(grid: Grid, draw: random.Random) -> Iterator[Grid]:
    """Solve a grid: all its solutions in random order, each found by trying the cell with the fewest options."""
    size = isqrt(len(grid))
    best: tuple[int, list[int]] | None = None
    for cell, digit in enumerate(grid):
        if not digit:
            options = _options(grid, cell, size)
            if best is None or len(options) < len(best[1]):
                best = (cell, options)
                if len(options) < 2:
                    break
    if best is None:
        yield grid
        return
    cell, options = best
    for digit in draw.sample(options, len(options)):
        yield from solutions([*grid[:cell], digit, *grid[cell + 1 :]], draw)


def _options(grid: Grid, cell: int, size: int) -> list[int]:
    """Find the digits that a cell's row, column and box leave it."""
    row, column = divmod(cell, size)
    side = isqrt(size)
    corner = row // side * side * size + column // side * side
    used = {*grid[row * size : (row + 1) * size], *grid[column::size]}
    for line in range(side):
        used.update(grid[corner + line * size : corner + line * size + side])
    return [digit for digit in range(1, size + 1) if digit not in used]


def make_puzzle(size: int, clues: int, draw: random.Random) -> tuple[Grid, Grid]:
    """Make a puzzle and its only solution: cells are emptied in random order as long as there is no second one.

    It can have a few more clues than asked for, where none can be spared.
    """
    solved = next(solutions([0] * size**2, draw))
    puzzle, left = list(solved), size**2
    for cell in draw.sample(range(size**2), size**2):
        if left <= clues:
            break
        trial = [*puzzle[:cell], 0, *puzzle[cell + 1 :]]
        found = solutions(trial, draw)
        if next(found) and next(found, None) is None:
            puzzle, left = trial, left - 1
    return puzzle, solved


def written(grid: Grid) -> str:
    """Write a grid as its rows, with a point for an empty cell."""
    size = isqrt(len(grid))
    cells = "".join(str(digit or ".") for digit in grid)
    return "\n".join(cells[start : start + size] for start in range(0, len(cells), size))


def example(puzzle: Grid, solved: Grid) -> dict[str, str]:
    """Make a line of a data file: the puzzle and what the model shall answer."""
    return {"prompt": f"Solve this Sudoku; write the grid alone.\n\n{written(puzzle)}", "completion": written(solved)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--size", type=int, choices=(4, 9), default=9)
    parser.add_argument("--clues", type=int, help="cells given; 36 of 81, or 6 of 16, where it is not said")
    parser.add_argument("--seed", type=int, default=0)
    for name, count in (("train", 8000), ("valid", 100), ("test", 500)):
        parser.add_argument(f"--{name}", type=int, default=count)
    given = parser.parse_args()
    draw, seen = random.Random(given.seed), dict[str, str]()
    given.data.mkdir(parents=True, exist_ok=True)
    for name in ("test", "valid", "train"):
        lines = 0
        with (given.data / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            while lines < vars(given)[name]:
                puzzle, solved = make_puzzle(given.size, given.clues or (36 if given.size == 9 else 6), draw)
                if seen.setdefault(written(puzzle), name) == name:
                    file.write(json.dumps(example(puzzle, solved)) + "\n")
                    lines += 1


if __name__ == "__main__":
    main()
