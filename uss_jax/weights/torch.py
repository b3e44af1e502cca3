"""Nets that have a PyTorch counterpart, by name; converts their Flax variables to state dicts."""

from uss_jax.errors import UserError
from uss_jax.weights import cnn14, htsat, resunet
from uss_jax.weights.porting import Fields, Porting, StateDict, state_dict_with

# Porting rules by the name of a net in a config.
_SEPARATORS = {"resunet": resunet.PORTING}
_TAGGERS = {"cnn14": cnn14.PORTING, "htsat": htsat.PORTING}


def state_dict_of(part: str, fields: Fields, variables: dict, prefix: str = "") -> StateDict:
    """Converts Flax variables to a torch state dict, the inverse of the nets' conversions.

    Args:
      part: "separator", "sed" or "query".
      fields: the module's fields, or a bundle config's, which have `net` and lists for tuples.
      variables: {"params": ..., "batch_stats": ...}.
      prefix: prefix of every name, such as `LIGHTNING_PREFIXES[part]`.

    Raises:
      UserError: the net or one of its leaves has no PyTorch counterpart.
    """
    porting = porting_of(part, fields.get("net"))
    fields = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name != "net"
    }
    return state_dict_with(porting, fields, variables, prefix)


def porting_of(part: str, name: str | None = None) -> Porting:
    """Returns a part's porting rules by name of the net; the first of the part when None."""
    nets = _SEPARATORS if part == "separator" else _TAGGERS
    name = name or next(iter(nets))
    if name not in nets:
        raise UserError(
            f"the {part} is a {name}, which has no PyTorch counterpart; only "
            f"{' and '.join(nets)} can be written for PyTorch"
        )
    return nets[name]
