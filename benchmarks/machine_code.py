"""The paths through the machine code of a persistent GEMM: what `static_report.py` counts on them.

The warps of `gemm_exp` take a branch around what few tiles need, such as the mask of the targets. A
count of all instructions shows neither that branch nor its loss, so these are counts along a path
of the control flow, from the listing that `nvdisasm -c` prints.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

LAST_PRODUCT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
"""Waits for all products of a tile: the epilogue begins behind it."""
PRODUCT = "HGMMA"
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]+\*/\s+(?:\{\s*)?((?:@!?U?P\w+\s+)?[A-Z][\w.]*[^;]*?)\s*;")
_JUMP = re.compile(r"^(@!?U?P\w+\s+)?(BRA|EXIT|RET|BRX|JMP)\b(?:.*?(\.L_x_\d+))?")
_MASK = re.compile(r"^(?:@!?U?P\w+\s+)?(?:FSEL|SEL|[IF]SETP|P2R)\b")


@dataclass(frozen=True)
class Epilogue:
    """Instructions of one thread between the last product of a tile and the way to the next.

    fast: on the shortest path, which skips every branch that can be skipped. masks: the compares
    and selects on it. all_masks: those of all paths together. step: from one step of the product to
    the next, without an epilogue.
    """

    fast: int
    masks: int
    all_masks: int
    step: int


class Flow:
    """Blocks of instructions and where each may go on: `flow.text[i]`, `flow.after[i]`."""

    def __init__(self, listing: str) -> None:
        self.text: list[list[str]] = [[]]
        labels: dict[str, int] = {}
        jumps: list[tuple[int, str]] = []
        falls: list[bool] = []

        def close(falls_through: bool) -> None:
            falls.append(falls_through)
            self.text.append([])

        for line in listing.splitlines():
            if label := _LABEL.match(line):
                close(True)
                labels[label.group(1)] = len(self.text) - 1
            elif found := _INSTRUCTION.search(line):
                instruction = found.group(1)
                self.text[-1].append(instruction)
                if jump := _JUMP.match(instruction):
                    guard, _, target = jump.groups()
                    if target:
                        jumps.append((len(self.text) - 1, target))
                    close(guard is not None)
                elif instruction.startswith((LAST_PRODUCT, PRODUCT)):
                    close(True)  # a path begins and ends at these
        falls.append(False)
        self.after: list[list[int]] = [[i + 1] if go_on else [] for i, go_on in enumerate(falls)]
        for block, target in jumps:
            self.after[block].append(labels[target])

    def reachable(self, start: int, without: int | None = None) -> set[int]:
        """The blocks on paths from `start` that do not enter `without`."""
        seen, todo = {start}, [start]
        while todo:
            for block in self.after[todo.pop()]:
                if block not in seen and block != without:
                    seen.add(block)
                    todo.append(block)
        return seen

    def shortest(
        self, starts: Sequence[int], ends: Callable[[int], bool], avoid: Sequence[int] = ()
    ) -> list[str]:
        """The instructions of the shortest path from behind one of `starts` to before an end."""
        heap: list[tuple[int, int, tuple[int, ...]]] = [
            (0, block, (block,)) for start in starts for block in self.after[start]
        ]
        done = set(avoid)
        heapq.heapify(heap)
        while heap:
            length, block, path = heapq.heappop(heap)
            if ends(block):
                return [line for inner in path[:-1] for line in self.text[inner]]
            if block in done:
                continue
            done.add(block)
            length += len(self.text[block])
            for further in self.after[block]:
                heapq.heappush(heap, (length, further, (*path, further)))
        raise ValueError("the listing has no path between the two places")


def epilogue_of(listing: str) -> Epilogue | None:
    """What a GEMM does between two tiles; None of code without HGMMA.

    The epilogue is what runs only behind LAST_PRODUCT: code that a step of the product may reach on
    another way, such as its loop's head, is no part of it. ValueError: the code is of another form.
    """
    flow = Flow(listing)
    products = [i for i, lines in enumerate(flow.text) if lines and lines[-1].startswith(PRODUCT)]
    if not products:
        return None
    waits = [
        i
        for i, lines in enumerate(flow.text)
        if lines
        and lines[-1].startswith(LAST_PRODUCT)
        # Triton 3.6 to 3.9 wait once more before the program ends, and store nothing then.
        and any("MUFU.EX2" in line for j in flow.reachable(i) for line in flow.text[j])
        and products[0] in flow.reachable(i)
    ]
    if len(waits) != 1:
        raise ValueError(f"got {len(waits)} waits for the last product of a tile, expected 1")
    wait = waits[0]
    elsewhere = flow.reachable(0, without=wait)
    region = flow.reachable(wait) - elsewhere - {wait}
    fast = flow.shortest([wait], lambda block: block not in region)
    first = products[0]
    step = flow.shortest([first], lambda block: block == first, avoid=[wait])
    own = [line for block in region for line in flow.text[block]]
    return Epilogue(
        fast=len(fast),
        masks=sum(bool(_MASK.match(line)) for line in fast),
        all_masks=sum(bool(_MASK.match(line)) for line in own),
        step=len(step) + len(flow.text[first]),
    )
