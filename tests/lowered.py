"""What a function is lowered to: the products and convolutions of its StableHLO."""

import dataclasses
import re

import jax


@dataclasses.dataclass(frozen=True)
class Product:
    """A `dot_general` or `convolution`.

    Attributes:
      where: names of the functions and modules around it, as far as JAX keeps them.
      precision: "DEFAULT", "HIGH" or "HIGHEST".
      line: the whole operation.
    """

    where: str
    precision: str
    line: str


def products(function, *arguments, platform="cuda") -> list[Product]:
    """The products of a function, lowered for a platform that need not be there."""
    traced = jax.jit(function).trace(*arguments)
    return products_of(traced.lower(lowering_platforms=(platform,)).as_text(debug_info=True))


def products_of(text: str) -> list[Product]:
    """The products of a StableHLO module."""
    names = dict(re.findall(r'^(#loc\d*) = loc\("([^"]*)"', text, re.MULTILINE))
    found = []
    for line in re.findall(r"^.*stablehlo\.(?:dot_general|convolution).*$", text, re.MULTILINE):
        (precision,) = set(re.findall(r"DEFAULT|HIGHEST|HIGH", line)) or {"DEFAULT"}
        place = re.search(r"loc\((#loc\d*)\)$", line)
        found.append(Product(names.get(place[1], "") if place else "", precision, line))
    return found


def precisions(found: list[Product]) -> set[str]:
    """The different precisions of some products."""
    return {product.precision for product in found}
