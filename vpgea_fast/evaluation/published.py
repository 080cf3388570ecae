"""Published figures beside which a comparison is read: accuracy in percent and mean tokens.

Protocols differ in context, in what counts as a token, and in draws: figures compare within a
table only. eps3 is computed here from both numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vpgea_fast.metrics import eps3

Cell = tuple[float, float | None]
"""Accuracy in percent; mean tokens where the paper prints them."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a paper: rows of (size, method, cells by benchmark)."""

    source: str
    protocol: str
    rows: tuple[tuple[str, str, dict[str, Cell]], ...]
    notes: tuple[str, ...] = ()


def plain(name: str) -> str:
    """Spell a benchmark's name as the tables do: AIME 2024, aime_2024 and aime24 are one.

    >>> plain("MATH-500"), plain("AIME 2024"), plain("gpqa"), plain("tiny")
    ('math500', 'aime24', 'gpqadiamond', 'tiny')
    """
    letters = "".join(c for c in name.lower() if c.isalnum())
    return ALIASES.get(letters, letters)


ALIASES = {
    "gsm8ktest": "gsm8k",
    # MATH is the 500 questions in every table but DLER's, whose protocol says so.
    "math": "math500",
    "math500test": "math500",
    "aime2024": "aime24",
    "aime2025": "aime25",
    "gpqa": "gpqadiamond",
    "gpqad": "gpqadiamond",
    "olympiad": "olympiadbench",
    "amc": "amc23",
    "amc2023": "amc23",
}


def shared(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give the tables that have one of these benchmarks, with the rows' cells of those alone.

    {table: {"source", "protocol", "notes", "rows": [{"size", "method", "benchmarks": {name:
    {"acc", "tokens", "eps3"}}}]}}; acc 0..1 as everywhere, tokens and eps3 None where not printed.
    """
    found = {}
    for key, table in TABLES.items():
        rows = [
            {"size": size, "method": method, "benchmarks": chosen}
            for size, method, cells in table.rows
            if (chosen := {n: _measures(cells[plain(n)]) for n in names if plain(n) in cells})
        ]
        if rows:
            about = {"source": table.source, "protocol": table.protocol, "notes": table.notes}
            found[key] = {**about, "rows": rows}
    return found


def _measures(cell: Cell) -> dict[str, float | None]:
    percent, tokens = cell
    acc = percent / 100
    return {"acc": acc, "tokens": tokens, "eps3": None if tokens is None else eps3(acc, tokens)}


def _read(benchmarks: str, text: str) -> tuple[tuple[str, str, dict[str, Cell]], ...]:
    """Read lines of "method | accuracy/tokens | ..."; "# 7B" heads the rows of a size."""
    names, size, rows = [plain(name) for name in benchmarks.split()], "", []
    for line in text.strip().splitlines():
        if line.startswith("# "):
            size = line[2:]
            continue
        method, *cells = line.split(" | ")
        # Strict: a missing cell would move a row's figures to other benchmarks.
        pairs = zip(names, cells, strict=True)
        # "-": the row's paper has no such benchmark.
        rows.append((size, method, {name: _cell(cell) for name, cell in pairs if cell != "-"}))
    return tuple(rows)


def _cell(text: str) -> Cell:
    percent, slash, tokens = text.partition("/")
    return float(percent), float(tokens) if slash else None


CLAIMS = (
    "eps3 is 8.73 % (1.5B) and 12.37 % (7B) above the strongest baseline of each size",
    "over 30 % fewer tokens than the base on both sizes",
    "7B on MATH-500: 30 % fewer tokens than the base, highest accuracy of all methods",
    "7B on AIME 2024: 16 points above the base",
)
"""What VPG-EA states in words; the figures of its plots are not public."""

TABLES = {
    "VPG-EA": Table(
        source="VPG-EA (arXiv 2605.11019): its text, and public listings of its results",
        protocol="one run, by its arithmetic (17 of 30, 465 of 500); token counts are not given",
        notes=CLAIMS,
        rows=_read(
            "gsm8k math500 aime24 gpqa_diamond mmlu_pro",
            """
# 7B
VPG-EA | 92 | 93.00 | 56.67 | 38.88 | 48.77
""",
        ),
    ),
    "T1": Table(
        source="AdaptThink, table 1 (arXiv 2505.13417)",
        protocol="16K context, T 0.6, no instruction in the prompt",
        rows=_read(
            "gsm8k math500 aime24",
            """
# 1.5B
Original | 79.0/978 | 80.6/4887 | 29.4/12073
NoThinking | 69.8/280 | 67.2/658 | 14.0/2190
DPO-Shortest | 78.3/804 | 82.4/3708 | 30.7/10794
OverThink | 77.2/709 | 81.2/4131 | 28.3/11269
DAST | 77.2/586 | 83.0/2428 | 26.9/7745
O1-Pruner | 74.8/458 | 82.2/3212 | 28.9/10361
TLMRE (Arora&Zanette) | 80.7/863 | 85.0/3007 | 29.2/8982
ModelMerging | 79.7/603 | 63/2723 | 18.1/10337
RFT-MixThinking | 76/1077 | 72.4/4341 | 25.2/11157
AdaptThink d=0.05 | 83.1/480 | 82.0/1782 | 31.0/6679
# 7B
Original | 87.9/682 | 90.2/3674 | 53.5/10306
NoThinking | 85.1/283 | 80.6/697 | 24.2/1929
DPO-Shortest | 85.7/402 | 91.6/2499 | 52.5/8699
OverThink | 86.3/426 | 89.4/2435 | 53.1/8744
DAST | 86.7/459 | 89.6/2162 | 45.6/7578
O1-Pruner | 87.6/428 | 86.6/2534 | 49.2/9719
TLMRE | 88.9/756 | 91.8/2899 | 54.0/8633
ModelMerging | 88.4/531 | 72.6/2280 | 36.9/8624
RFT-MixThinking | 86.2/365 | 84.8/2411 | 49.4/9969
AdaptThink d=0.05 | 91.0/309 | 92.0/1875 | 55.6/8599
""",
        ),
    ),
    "T2": Table(
        source="LC-R1, table 1 (arXiv 2506.14755)",
        protocol="DeepSeek-R1-Distill-Qwen; context and draws as in its paper",
        rows=_read(
            "gsm8k math500 aime25 gpqa_diamond",
            """
# 7B
Base | 91.6/1842 | 92.6/3832 | 37.7/11007 | 46.6/6508
SFT | 91.9/946 | 90.2/2497 | 36.6/9457 | 39.8/8217
DPO | 90.3/980 | 91.4/2277 | 36.9/9718 | 37.2/8109
O1-Pruner | 91.1/1012 | 91.5/2268 | 35.0/8263 | 45.5/5012
ThinkPrune | 91.2/1546 | 93.1/3253 | 38.0/9309 | 50.3/6508
SFT+O1-Pruner | 89.7/920 | 91.0/2245 | 35.5/9466 | 43.9/6425
LC-R1 | 88.1/450 | 90.4/1568 | 36.2/7150 | 47.2/4604
# 1.5B
Base | 83.4/2294 | 83.7/4869 | 22.8/12129 | 34.5/8516
SFT | 81.3/1134 | 81.4/3045 | 20.5/10639 | 22.4/10217
DPO | 80.9/855 | 79.0/2749 | 19.4/10316 | 19.8/9438
O1-Pruner | 82.7/1162 | 84.3/2913 | 23.2/8731 | 32.1/6173
ThinkPrune | 84.1/1690 | 84.5/3518 | 24.1/7960 | 33.6/5576
SFT+O1-Pruner | 81.5/919 | 80.2/2769 | 17.5/9075 | 25.0/7410
LC-R1 | 82.7/841 | 82.5/2233 | 21.2/6434 | 33.6/4489
""",
        ),
    ),
    "T3": Table(
        source="Internal and external redundancy of reasoning, table 1",
        protocol="tokens of the thought alone, not of the answer",
        rows=_read(
            "gsm8k math500 aime24",
            """
# 1.5B
Original | 84.1/1555 | 82.2/3549 | 28.5/8681
ThinkPrune-4k | 86.1/910 | 83.7/2101 | 28.6/6431
LC-R1 | 82.5/507 | 79.6/1673 | 24.2/5075
Laser-DE | 86.4/971 | 83.6/2282 | 32.7/7268
'Training' (Arora&Zanette) | 81.0/292 | 82.8/1543 | 28.5/7049
that paper's own | 84.9/513 | 83.8/1505 | 34.0/6077
# 7B
Original | 91.1/844 | 91.2/2836 | 52.3/7241
ThinkPrune-4k | 92.8/716 | 89.7/1683 | 50.4/5723
LC-R1 | 87.5/152 | 87.5/1201 | 52.7/6087
Laser-DE | 93.3/637 | 92.1/1402 | 52.7/5061
'Training' | 91.2/387 | 91.0/2090 | 50.8/6669
that paper's own | 90.9/318 | 89.8/1200 | 53.2/5025
""",
        ),
    ),
    "T4": Table(
        source="DLER, table 1",
        protocol="mean of 16 samples, 32K context, T 0.6, top_p 0.95; MATH is the paper's own set",
        rows=_read(
            "math500 aime24",
            """
R1-1.5B | 84.31/5500 | 29.79/16916
LC-R1-1.5B | 81.8/2612 | 21.04/9335
Laser-DE-L4096-1.5B | 85.27/2685 | 30.62/8194
AdaptThink-1.5B | 82.26/1651 | 30.21/7550
DLER-R1-1.5B | 86.95/1652 | 34.38/3551
DA-DLER-R1-1.5B | 86.7/1484 | 34.37/2888
R1-7B | 93.6/3999 | 55.4/13241
VeriThinker-7B | 93.63/2591 | 51.25/9805
LC-R1-7B | 90.65/1534 | 50.2/7305
Laser-DE-L4096-7B | 93.48/1759 | 55.2/5691
AdaptThink-7B | 91.38/2005 | 53.12/10250
DLER-R1-7B | 94.21/1634 | 55.62/3230
DA-DLER-R1-7B | 94.17/1481 | 53.9/2878
""",
        ),
    ),
    # T8192, T4096: trained under that token limit. Group: Arora and Zanette's reward.
    "T5": Table(
        source="Laser, tables 3 and 4, selected (arXiv 2505.15612)",
        protocol="R1-Distill-Qwen, 1.5B unless the name says 7B; context and draws as in its paper",
        rows=_read(
            "math500 aime24",
            """
R1-1.5B | 83.9/5042 | 28.9/15956
T8192 | 81.8/1795 | 24.8/4465
T4096 | 77.7/1054 | 19.2/2481
Group a=0.4 | 74.6/1069 | 25.0/4747
Group a=0.1 | 77.0/1228 | 29.0/6301
L1-Max-1024 | 76.4/661 | 15.0/1303
L1-Max-4096 | 79.7/875 | 20.0/1718
Laser LT=8192 | 85.6/2736 | 31.5/6589
Laser-D LT=4096 | 84.2/1872 | 34.2/5750
Laser-DE LT=4096 | 83.5/1949 | 35.0/5789
R1-7B | 92.6/4017 | 53.1/13414
T8192-7B | 92.0/1972 | 51.9/5655
Group-7B a=0.2 | 89.4/780 | 48.1/4271
Laser-7B | 92.2/2317 | 54.4/6320
Laser-D-7B | 92.2/1836 | 58.3/5379
Laser-DE-7B | 92.0/1658 | 55.8/4969
""",
        ),
    ),
    "T6": Table(
        source="SmartThinker and LAPO, as each prints them",
        protocol="each base under its own protocol",
        rows=_read(
            "math500 aime25 aime24",
            """
# 1.5B
Base [SmartThinker] | 84.9/5420 | 24.2/15199 | -
ShorterBetter | 71.0/1008 | 19.0/3727 | -
ThinkPrune-4k | 84.1/2744 | 22.5/7462 | -
LASER-DE-4096 | 85.1/2720 | 22.5/7706 | -
SmartThinker | 84.5/2645 | 25.0/8431 | -
Base [LAPO] | 83.1/4031 | - | 30.3/12150
HAPO | 82.2/2288 | - | 31.3/8649
AutoThink | 83.5/2017 | - | 29.7/7084
AdaptThink | 81.6/1580 | - | 23.9/6432
LAPO-I | 84.3/2354 | - | 29.3/8318
""",
        ),
    ),
    # PA, PB: two prompts of its posterior. Acc, GML, L: the answer by share of right samples, by
    # geometric mean, by likelihood.
    "VR": Table(
        source="Variational Reasoning, full text (arXiv 2509.22637)",
        protocol="accuracy alone; 4B and 8B: Qwen3-Base, 7B and 32B: Qwen2.5-Instruct",
        rows=_read(
            "math500 aime24 aime25 amc23 olympiadbench gpqa_diamond "
            "lcb_easy lcb_medium lcb_hard mmlu_pro",
            """
Qwen3-4B-Base | 45.30 | 4.79 | 5.73 | 27.73 | 23.37 | 29.10 | 18.54 | 5.46 | 1.32 | 36.89
General-Reasoner-4B | 71.70 | 19.06 | 16.77 | 55.00 | 45.18 | 40.97 | 61.40 | 17.90 | 2.85 | 61.36
Bespoke-Stratos-4B† | 84.70 | 27.29 | 24.17 | 70.16 | 50.45 | 44.95 | 71.22 | 19.54 | 3.25 | 63.03
VR PB-GML-4B | 87.30 | 33.54 | 26.77 | 74.06 | 54.45 | 45.52 | 79.53 | 31.25 | 6.20 | 65.52
VR PB-Acc-4B | 88.30 | 31.67 | 27.29 | 75.63 | 55.71 | 45.33 | 80.29 | 33.68 | 5.79 | 65.53
(4B) without y' | 81.20 | 23.44 | 23.96 | 65.70 | 46.59 | 40.53 | 67.93 | 16.63 | 2.44 | 61.49
Qwen3-8B-Base | 65.20 | 11.46 | 10.10 | 45.00 | 34.72 | 35.42 | 41.14 | 13.65 | 1.42 | 45.62
Bespoke-Stratos-8B† | 89.70 | 39.58 | 28.85 | 78.91 | 55.64 | 53.03 | 81.53 | 36.89 | 7.11 | 68.74
VR PB-GML-8B | 91.60 | 44.06 | 31.67 | 83.59 | 58.23 | 52.72 | 87.36 | 45.51 | 13.82 | 70.76
VR PB-Acc-8B | 91.80 | 45.63 | 31.98 | 85.47 | 58.98 | 53.66 | 86.47 | 49.33 | 13.21 | 70.76
Qwen2.5-32B-Inst | 80.70 | 15.83 | 12.08 | 61.95 | 46.96 | 46.28 | 79.88 | 40.60 | 9.76 | 59.19
Bespoke-Stratos-32B | 92.60 | 55.42 | 46.88 | 92.19 | 64.68 | 57.57 | 94.78 | 73.54 | 30.48 | 75.22
RLT-32B | 93.50 | 56.77 | 47.19 | 91.48 | 63.21 | 59.09 | 93.20 | 72.15 | 29.78 | 74.88
VR PA-GML-32B | 93.20 | 56.56 | 48.13 | 93.98 | 64.24 | 60.92 | 95.19 | 72.21 | 35.57 | 75.57
VR PA-Acc-32B | 93.50 | 58.85 | 50.31 | 92.97 | 64.39 | 60.73 | 94.78 | 73.18 | 31.81 | 75.55
Qwen2.5-7B-Inst | 75.60 | 10.94 | 7.40 | 51.10 | 39.91 | 29.99 | 62.50 | 18.20 | 3.35 | 48.20
Bespoke-Stratos-7B | 82.20 | 19.58 | 19.48 | 63.28 | 45.03 | 39.02 | 69.30 | 23.06 | 2.95 | 60.59
RLT-7B | 84.30 | 22.81 | 19.48 | 64.84 | 46.43 | 41.60 | 72.32 | 25.06 | 3.66 | 61.28
VR PA-GML-7B | 85.30 | 24.17 | 20.42 | 68.20 | 46.88 | 43.62 | 74.52 | 27.79 | 4.78 | 60.88
VR PA-Acc-7B | 83.40 | 22.50 | 20.83 | 65.39 | 47.55 | 43.56 | 74.45 | 29.43 | 4.37 | 60.72
VR PB-GML-7B | 84.00 | 22.08 | 20.42 | 66.80 | 46.29 | 41.60 | 74.73 | 28.46 | 4.57 | 61.14
VR PB-Acc-7B | 84.80 | 23.96 | 19.69 | 65.00 | 48.15 | 41.67 | 75.07 | 29.49 | 4.68 | 61.28
1K Bespoke-7B-1K† | 77.20 | 16.25 | 13.96 | 53.75 | 40.88 | 37.94 | 60.37 | 13.59 | 1.22 | 56.07
1K Acc (M, no mix) | 81.30 | 19.69 | 18.44 | 61.64 | 45.99 | 41.16 | 68.13 | 21.42 | 1.42 | 60.94
1K GML | 81.30 | 19.27 | 18.33 | 62.50 | 45.48 | 41.35 | 68.41 | 23.30 | 2.74 | 61.31
1K L | 79.90 | 17.81 | 14.17 | 59.53 | 43.62 | 39.90 | 66.42 | 19.90 | 1.93 | 58.61
""",
        ),
    ),
}
