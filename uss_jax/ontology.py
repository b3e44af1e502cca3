"""The AudioSet ontology: 632 nodes, of which 527 are classes, numbered 0..526.

The ontology is a graph, not a tree: 38 nodes have two or more parents ("Children shouting" is both
a shout and a human group action). `Ontology` keeps all parents. `reference_tree` builds the tree of
bytedance/uss from the same table, where every node has a single parent.
"""

import csv
import dataclasses
import difflib
import functools
import importlib.resources
from collections.abc import Iterable

from uss_jax.errors import UserError

_LABEL_SHOWN = 80  # characters


@dataclasses.dataclass(frozen=True)
class Node:
    """A sound category of the ontology.

    Attributes:
      mid: id in the ontology, such as "/m/09x0r".
      name: display name, such as "Speech".
      class_index: index among the 527 classes; None for other nodes.
      children, parents: mids, in the order of the table.
      level: 1 for the seven top nodes, else one more than the lowest level of a parent.
      restrictions: "abstract" and "blacklist" as in the ontology; mostly empty.
    """

    mid: str
    name: str
    class_index: int | None
    children: tuple[str, ...]
    parents: tuple[str, ...]
    level: int
    restrictions: tuple[str, ...]


def whole_number(text: str) -> int | None:
    """Parses up to nine ASCII digits as an integer; returns None for any other text."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


@dataclasses.dataclass(frozen=True)
class Ontology:
    """All nodes with all their parents; converts between mids, names and class indexes."""

    nodes: dict[str, Node]

    @functools.cached_property
    def class_mids(self) -> tuple[str, ...]:
        """The mid of each class index."""
        classes = [node for node in self.nodes.values() if node.class_index is not None]
        return tuple(node.mid for node in sorted(classes, key=lambda node: node.class_index))

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """The display name of each class index."""
        return tuple(self.nodes[mid].name for mid in self.class_mids)

    @functools.cached_property
    def levels(self) -> dict[int, tuple[str, ...]]:
        """Maps each level, from 1, to its mids in the order of the table."""
        levels: dict[int, list[str]] = {}
        for node in self.nodes.values():
            levels.setdefault(node.level, []).append(node.mid)
        return {level: tuple(levels[level]) for level in sorted(levels)}

    def descendants(self, mid: str) -> frozenset[str]:
        """Returns the mids of the node and all its descendants."""
        return self._reach(mid, "children")

    def ancestors(self, mid: str) -> frozenset[str]:
        """Returns the mids of the node and all its ancestors."""
        return self._reach(mid, "parents")

    def class_indexes(self, mid: str) -> tuple[int, ...]:
        """Returns the class indexes of a node and its descendants, ascending."""
        return tuple(sorted(self._classes(self.descendants(mid))))

    def relatives(self, class_index: int) -> frozenset[int]:
        """Returns the class indexes of a class, its ancestors and its descendants."""
        return self._relatives[class_index]

    def resolve(self, label: str) -> int:
        """Returns the class index of a label: a name or mid in any case, or an index as text.

        Raises:
          UserError: the label is not a class; suggests others.
        """
        text = label.strip()
        node = self._find(text)
        if node is None:
            raise self._unknown(text, self.class_names)
        if node.class_index is None:
            below = [self.class_names[index] for index in self.class_indexes(node.mid)]
            advice = (
                f"name classes below it, such as {', '.join(below[:3])}" if below else "drop it"
            )
            raise UserError(
                f'"{text}" is in the ontology but not one of the {len(self.class_mids)} classes; '
                f"{advice}"
            )
        return node.class_index

    def node(self, label: str) -> Node:
        """Returns the node of a label: a name or mid in any case, or a class index as text.

        Raises:
          UserError: no node is called so; suggests others.
        """
        text = label.strip()
        node = self._find(text)
        if node is None:
            raise self._unknown(text, [node.name for node in self.nodes.values()])
        return node

    def _find(self, text: str) -> Node | None:
        if (index := whole_number(text)) is not None and index < len(self.class_mids):
            return self.nodes[self.class_mids[index]]
        return self._by_label.get(text.casefold())

    def _unknown(self, text: str, names: Iterable[str]) -> UserError:
        text = text if len(text) <= _LABEL_SHOWN else f"{text[:_LABEL_SHOWN]}..."
        return UserError(f'no sound class is called "{text}"; {self._advice(text, names)}')

    def _advice(self, text: str, known: Iterable[str]) -> str:
        if text.strip("-.").isdigit():
            return f"class indexes go from 0 to {len(self.class_mids) - 1}"
        names = {name.casefold(): name for name in known}
        close = difflib.get_close_matches(text.casefold(), names, n=3, cutoff=0.6)
        close += [name for name in names if text.casefold() in name and name not in close]
        if text and close:
            return "did you mean " + " or ".join(f'"{names[name]}"' for name in close[:3]) + "?"
        return (
            "use one of AudioSet's class names, a mid such as /m/09x0r, or an index from 0 to 526"
        )

    @functools.cached_property
    def _by_label(self) -> dict[str, Node]:
        by_name = {node.name.casefold(): node for node in self.nodes.values()}
        return by_name | {mid.casefold(): node for mid, node in self.nodes.items()}

    @functools.cached_property
    def _relatives(self) -> tuple[frozenset[int], ...]:
        return tuple(
            frozenset(self._classes(self.ancestors(mid) | self.descendants(mid)))
            for mid in self.class_mids
        )

    def _classes(self, mids: frozenset[str]) -> list[int]:
        indexes = (self.nodes[mid].class_index for mid in mids)
        return [index for index in indexes if index is not None]

    def _reach(self, mid: str, direction: str) -> frozenset[str]:
        reached, frontier = {mid}, [mid]
        while frontier:
            new = set(getattr(self.nodes[frontier.pop()], direction)) - reached
            reached |= new
            frontier.extend(new)
        return frozenset(reached)


def _read_table() -> list[dict[str, str]]:
    path = importlib.resources.files("uss_jax") / "assets" / "ontology.csv"
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split(";")) if text else ()


@functools.cache
def load_ontology() -> Ontology:
    """Returns the bundled ontology, read on the first call."""
    rows = _read_table()
    children = {row["mid"]: _split(row["children"]) for row in rows}
    parents: dict[str, list[str]] = {mid: [] for mid in children}
    for mid, below in children.items():
        for child in below:
            parents[child].append(mid)

    levels: dict[str, int] = {}
    frontier, level = [mid for mid in parents if not parents[mid]], 1
    while frontier:  # breadth first, so that a node's level follows its topmost parent
        levels.update(dict.fromkeys(frontier, level))
        below = dict.fromkeys(child for mid in frontier for child in children[mid])
        frontier, level = [mid for mid in below if mid not in levels], level + 1

    return Ontology(
        {
            row["mid"]: Node(
                mid=row["mid"],
                name=row["name"],
                class_index=int(row["class_index"]) if row["class_index"] else None,
                children=children[row["mid"]],
                parents=tuple(parents[row["mid"]]),
                level=levels[row["mid"]],
                restrictions=_split(row["restrictions"]),
            )
            for row in rows
        }
    )


@dataclasses.dataclass
class TreeNode:
    """A node of the reference tree.

    Attributes:
      mid, name: as in the ontology; both are "root" for the artificial root.
      level: depth; 0 for the artificial root.
      class_index: index among the 527 classes; None for other nodes.
      children: child nodes, in the order of the table.
    """

    mid: str
    name: str
    level: int
    class_index: int | None
    children: list["TreeNode"] = dataclasses.field(default_factory=list)

    def walk(self) -> list["TreeNode"]:
        """Returns this node and its descendants in depth-first pre-order."""
        return [self] + [node for child in self.children for node in child.walk()]

    def class_indexes(self) -> list[int]:
        """Returns the class indexes of this node and its descendants, in the order of `walk`."""
        return [node.class_index for node in self.walk() if node.class_index is not None]


def reference_tree() -> TreeNode:
    """Builds the tree of bytedance/uss, for results that must equal the reference's.

    Nodes are added in the order of the table. Each becomes a child of its first parent found in the
    tree so far, depth first; other parents are dropped. A node that precedes all its parents
    becomes a child of the artificial root.
    """
    root = TreeNode("root", "root", level=0, class_index=None)
    ontology = load_ontology()
    for node in ontology.nodes.values():
        parents = (above for above in root.walk() if above.mid in node.parents)
        parent = next(parents, root)
        parent.children.append(TreeNode(node.mid, node.name, parent.level + 1, node.class_index))
    return root
