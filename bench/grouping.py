"""Which contenders are loaded at the same time: all that fit, so that each is compared with the others in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def groups(ours: Sequence[str], peers: Sequence[str], sizes: Mapping[str, float], limit: float) -> list[list[str]]:
    """Put contenders into groups that fit into memory.

    Every two of ours, and every one of ours with every peer, share a group if the two fit together at all: a ratio is
    only ever taken inside a group. A contender that fits with none of them but fits alone gets its own group.

    Args:
        ours: Names of pgfast contenders.
        peers: Names of the others.
        sizes: Memory of each.
        limit: Memory of the machine, in the same unit.

    Returns:
        Names of each group, in the order given; contenders larger than the limit are in none.
    """
    order = [name for name in (*ours, *peers) if sizes[name] <= limit]
    wanted = [
        (a, b) for i, a in enumerate(order) for b in order[i + 1 :] if (a in ours or b in ours) and sizes[a] + sizes[b] <= limit
    ]
    result: list[list[str]] = []
    while wanted:
        largest = max(wanted, key=lambda pair: sizes[pair[0]] + sizes[pair[1]])
        group = set(largest)
        # whoever brings most missing pairs comes next
        while gains := {
            name: gain
            for name in order
            if name not in group and sum(sizes[n] for n in group) + sizes[name] <= limit
            if (gain := sum(1 for pair in wanted if name in pair and (set(pair) - {name}) <= group))
        }:
            group.add(max(gains, key=lambda name: gains[name]))
        result.append([name for name in order if name in group])
        wanted = [pair for pair in wanted if not set(pair) <= group]
    placed = {name for group in result for name in group}
    return result + [[name] for name in order if name not in placed]
